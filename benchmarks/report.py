"""Write the tables of the documents from the records in benchmarks/results: numbers are never typed.

python -m benchmarks.report                  rewrite what stands between the markers
python -m benchmarks.report --records OUT    first take the records of a GPU's campaign into benchmarks/results
python -m benchmarks.report --check          fail if that would change anything
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from uso_engine.model.params import TransformerParams
from uso_engine.precision.tiers import TIERS, TierName, linear_classes
from uso_engine.precision.transformer import layer_formats

from .fidelity.quality import quality_table, training_table
from .gpu import tables as gpu_tables
from .records import Record, hardware, latest, load, table, take
from .serving.http_tables import HTTP_TABLES
from .serving.tables import serving_table
from .step.roofline import GPUS, Tokens, floor_ms, memory_bytes, step_flops

ROOT = Path(__file__).resolve().parents[1]


def roofline_table(records: list[Record]) -> str:
    params, rows = TransformerParams(), []
    for name, tokens in (
        ("text only", Tokens()),
        ("content", Tokens(content=1024)),
        ("content + 1 style", Tokens(style=192, content=1024)),
    ):
        floors = [floor_ms(params, tokens, gpu) for gpu in GPUS.values()]
        cells = [f"{floor['floor']:.0f} / {floor['separate kernels']:.0f}" for floor in floors]
        rows.append([f"{name}, L = {tokens.all}", f"{step_flops(params, tokens) / 1e12:.1f}", *cells])
    return table(["1024 x 1024, bf16", "TFLOP a step", *(f"{name}, ms" for name in GPUS)], rows)


def reads_floats(params: TransformerParams, tier: TierName) -> bool:
    """Whether a tier's products read floats, not 8-bit rows."""
    classes = linear_classes()
    return all(kind == "float" or classes[kind].takes is None for kind in set(layer_formats(params, tier).values()))


def memory_table(records: list[Record]) -> str:
    params, tokens = TransformerParams(), Tokens(style=192, content=1024)
    rows = []
    for tier, row in TIERS.items():
        if row.is_exact:
            continue
        for keeps in (True, False):
            memory = memory_bytes(params, tokens, tier=tier, keeps_modulation=keeps, reads_floats=reads_floats(params, tier))
            cells = [f"{memory[name] / 1e9:.2f}" for name in ("weights", "modulation_table", "activations")]
            rows.append([tier, "yes" if keeps else "no", *cells, f"{sum(memory.values()) / 1e9:.2f}"])
    header = ["weights", "modulation linears stay", "weights, GB", "table, GB", "activations, GB", "sum, GB"]
    return table(header, rows)


def ladder_table(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}, {r['dtype']}",
            r["rung"],
            f"{r['median_ms']:.0f}",
            f"{r['p20_ms']:.0f} to {r['p80_ms']:.0f}",
            f"{r['speedup']:.2f}",
            f"{r['allocations']:.0f}",
            f"{r['difference']:.1e}",
        ]
        for r in latest(records, "ladder", "workload", "dtype", "rung")
    ]
    header = ["machine", "workload", "rung", "ms (median)", "p20 to p80", "times the first", "allocations", "difference"]
    return table([*header], rows) + clock_note(records, "ladder") if rows else "Not measured yet."


def clock_note(records: list[Record], benchmark: str) -> str:
    on_cpu = [r for r in records if r["benchmark"] == benchmark and r.get("clock") == "process"]
    if not on_cpu:
        return ""
    threads = sorted({r["machine"]["threads"] for r in on_cpu})
    return f"\n\nCPU rows: processor time of {threads} thread(s), since the machine was shared with other work."


def step_table(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}, {r['dtype']}",
            f"{r['ours_ms']['median_ms']:.0f}",
            f"{r['diffusers_ms']['median_ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['flops'] / 1e12:.2f}",
            f"{r['ours_allocations']['allocations']:.0f} / {r['diffusers_allocations']['allocations']:.0f}",
            f"{r['difference']:.1e}",
        ]
        for r in latest(records, "step", "workload", "dtype")
    ]
    header = ["machine", "workload", "ours, ms", "diffusers, ms", "ratio", "TFLOP", "allocations, ours / theirs", "difference"]
    return table(header, rows) + clock_note(records, "step") if rows else "Not measured yet."


def tier_table(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            r["workload"],
            r["tier"],
            f"{r['tier_ms']['median_ms']:.0f}",
            f"{r['bf16_ms']['median_ms']:.0f}",
            f"{r['times_bf16']:.2f}",
            f"{100 * r['difference']:.1f} %",
            f"{r['resident_gb']:.2f}",
        ]
        for r in latest(records, "tier_steps", "workload", "tier")
    ]
    header = ["machine", "workload", "tier", "step, ms", "bf16, ms", "times bf16", "velocity differs", "without modulation, GB"]
    return table(header, rows) + clock_note(records, "tier_steps") if rows else "Not measured yet."


def kernel_table(records: list[Record]) -> str:
    rows = []
    for r in latest(records, "kernel", "kernel", "rows", "width"):
        compiled = r["times"].get("torch.compile")
        rate = f"{r['tflops']:.0f} TFLOP/s" if r["tflops"] else f"{r['gbs']:.0f} GB/s"
        cells = [f"{r['times'][name]['median_ms'] * 1e3:.0f}" for name in ("ours", "eager")]
        cells.append(f"{compiled['median_ms'] * 1e3:.0f}" if compiled else "")
        rows.append([hardware(r), r["kernel"], *cells, rate, f"{100 * r['share_of_ceiling']:.0f} %"])
    header = ["machine", "kernel", "ours, us", "eager, us", "torch.compile, us", "rate", "of the ceiling"]
    return table(header, rows) if rows else "Not measured yet: no GPU was to be had."


def faithfulness_table(records: list[Record]) -> str:
    rows = [
        [r["difference"], r["compared"], f"{r['relative_error']:.1e}", r["on"]]
        for r in records
        if r["benchmark"] == "faithfulness"
    ]
    return table(["difference", "compared", "relative error", "on"], rows) if rows else "Not measured yet."


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "roofline": roofline_table,
    "memory": memory_table,
    "ladder": ladder_table,
    "step": step_table,
    "tiers": tier_table,
    "kernels": kernel_table,
    "faithfulness": faithfulness_table,
    **HTTP_TABLES,
    "quality": lambda records: quality_table(),
    "training": lambda records: training_table(),
    "serving": serving_table,
    **gpu_tables.TABLES,
}
DOCUMENTS = {
    "docs/performance.md": ("roofline", "memory", "ladder", "step", "tiers", "kernels", *gpu_tables.TABLES),
    "docs/faithfulness.md": ("faithfulness",),
    "docs/quality.md": ("quality", "training"),
    "docs/http-api.md": tuple(HTTP_TABLES),
    "docs/serving.md": ("serving",),
    "README.md": ("step", "ladder"),
}
"""Which tables stand in which document."""


def rewrite(document: str, text: str, records: list[Record]) -> str:
    """A document's text with every table of it made anew.

    Raises:
        SystemExit: a table of ours has no place in it.
    """
    for name in DOCUMENTS[document]:
        make = TABLES[name]
        place = re.search(rf"<!-- table {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)
        if place is None:
            raise SystemExit(f"{document} has no place for the table {name!r}")
        text = f"{text[: place.start(1)]}{make(records)}\n{text[place.end(1) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, help="folder that a GPU's campaign wrote to")
    options = parser.parse_args()
    if options.records is not None:
        taken, left = take(options.records)
        print(f"{taken} records taken, {left} left out (of a rehearsal, or taken before)")
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text()
        after = rewrite(document, before, load())
        if options.check and after != before:
            raise SystemExit(f"{document} differs from its records; run python -m benchmarks.report")
        path.write_text(after)


if __name__ == "__main__":
    main()
