"""Write every generated table and plot of the README and the documents from records: their numbers are never typed.

python -m benchmarks.report                  rewrite what stands between the markers, and draw the plots
python -m benchmarks.report --records OUT    first take the records of a GPU's campaign into benchmarks/results
python -m benchmarks.report --check          change nothing; fail where that would, and say where
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from .compare import plots as compare_plots
from .compare import tables as compare
from .documents import Plot, SvgPlot, Table, rewritten, section_of, typed_results
from .fidelity import curve
from .fidelity import tables as fidelity
from .frontier import plot as frontier_plot
from .frontier import tables as frontier
from .gpu import tables as gpu
from .kernels import tables as kernels
from .memory import tables as memory
from .records import Record, load, take
from .release import tables as release
from .scaling import plots as scaling_plots
from .scaling import tables as scaling
from .serving import tables as serving
from .step import tables as step
from .tiers import tables as tiers

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (compare, release, step, tiers, kernels, memory, fidelity, frontier, serving, scaling, gpu)
TABLES: tuple[Table, ...] = tuple(table for folder in FOLDERS for table in folder.TABLES)
PLOTS: tuple[Plot | SvgPlot, ...] = (curve.PLOT, compare_plots.PLOT, frontier_plot.PLOT, *scaling_plots.PLOTS)
RESULTS = {
    "README.md": ("Results",),
    "docs/performance.md": (
        "Whole requests",
        "The ladder",
        "One step against diffusers",
        "Before and after the loop",
        "Kernels",
    ),
}
"""Sections that tell results: their numbers come from records, none is typed."""


def documents(root: Path) -> Iterator[str]:
    """Every document in which a table may stand, by its path from the root."""
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "deploy/**/*.md", "uso_engine/**/*.md"):
        yield from (path.relative_to(root).as_posix() for path in sorted(root.glob(pattern)))


def outdated(root: Path, tables: tuple[Table, ...], plots: tuple[Plot | SvgPlot, ...], records: list[Record]) -> Iterator[str]:
    """Documents and plots that differ from their records, each with what to do about it.

    Raises:
        ValueError: a document has a place that is no table's, or a table has no place.
    """
    for document in sorted({*documents(root), *(table.document for table in tables)}):
        text = (root / document).read_text(encoding="utf-8")
        if rewritten(document, text, tables, records) != text:
            wrong = [t.marker for t in tables if t.document == document and t.text(records) not in text]
            yield f"{document} differs from its records in the tables {wrong}"
        for heading in RESULTS.get(document, ()) if tables is TABLES else ():
            if typed := typed_results(section_of(text, heading)):
                yield f"{document}, section {heading}: {typed} are typed; results come from records"
    yield from (f"{p.path} was not drawn from the records that are there" for p in plots if not p.is_current(root, records))


def write(root: Path, tables: tuple[Table, ...], plots: tuple[Plot | SvgPlot, ...], records: list[Record]) -> None:
    """Make every table and plot anew."""
    for document in sorted({*documents(root), *(table.document for table in tables)}):
        path = root / document
        text = path.read_text(encoding="utf-8")
        if (new := rewritten(document, text, tables, records)) != text:
            path.write_text(new, encoding="utf-8")
    for plot in plots:
        if not plot.is_current(root, records):
            plot.write(root, records)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, help="folder that a GPU's campaign wrote to")
    options = parser.parse_args(arguments)
    if options.check and options.records is not None:
        parser.error("--check changes nothing, and --records takes records: give one of them")
    if options.records is not None:
        taken, left = take(options.records)
        print(f"{taken} records taken, {left} left out (of a rehearsal, or taken before)")
    try:
        if not options.check:
            write(ROOT, TABLES, PLOTS, load())
        elif wrong := list(outdated(ROOT, TABLES, PLOTS, load())):
            raise SystemExit("\n".join([*wrong, "run python -m benchmarks.report"]))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
