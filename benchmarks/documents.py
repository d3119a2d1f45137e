"""Generated parts of documents: tables between markers, and plots, each made from records by one function.

A table named `step` stands between `<!-- table step -->` and `<!-- end step -->`; `python -m benchmarks.report` makes them all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from .records import Record

PENDING = "Pending: not measured yet."
# At the beginning of a line: in the middle of one it is prose about markers.
_OPENING = re.compile(r"^<!-- table (.+?) -->", re.MULTILINE)
_BLOCK = re.compile(r"^(<!-- table (?P<marker>.+?) -->\n)(?P<body>.*?)^(<!-- end (?P=marker) -->)", re.DOTALL | re.MULTILINE)

_RESULT = re.compile(
    r"\d[\d.,]*(?:\s|&nbsp;)*(?:ms|s|seconds|minutes|times|×|%|per cent|[GT]FLOP(?:/s)?|[GT]B(?:/s)?|[MG]iB)(?![\w-])"
)


@dataclass(frozen=True)
class Table:
    """A table of a document.

    Args:
        document: its path in the repository.
        marker: the name between the markers.
        benchmarks: those whose records it shows; none where it is computed from the code or from files of its own.
        make: the records of these benchmarks, oldest first, to Markdown.
    """

    document: str
    marker: str
    benchmarks: tuple[str, ...]
    make: Callable[[list[Record]], str]

    def text(self, records: Sequence[Record]) -> str:
        """The table, made from those of all records that are its own."""
        return self.make([record for record in records if record["benchmark"] in self.benchmarks])


@dataclass(frozen=True)
class Plot:
    """A PNG file drawn from records; the file holds their hash, so that one drawn from others is found.

    Args:
        path: of the file, in the repository.
        sources: paths of the records.
        draw: the folder of the repository to the picture.
    """

    path: str
    sources: tuple[str, ...]
    draw: Callable[[Path], Image.Image]

    def is_current(self, root: Path, records: Sequence[Record]) -> bool:
        """Whether the file was drawn from the records as they are; `records`, of benchmarks, are not its own."""
        path = root / self.path
        if not path.exists():
            return False
        with Image.open(path) as picture:
            return picture.info.get("records") == self._hash(root)

    def write(self, root: Path, records: Sequence[Record]) -> None:
        """Draw it anew."""
        text = PngImagePlugin.PngInfo()
        text.add_text("records", self._hash(root))
        self.draw(root).save(root / self.path, pnginfo=text)

    def _hash(self, root: Path) -> str:
        return hashlib.sha256(b"".join((root / source).read_bytes() for source in self.sources)).hexdigest()


@dataclass(frozen=True)
class SvgPlot:
    """An SVG file drawn from the records of some benchmarks; the same records give the same text.

    Args:
        path: of the file, in the repository.
        benchmarks: those whose records it shows.
        draw: their records, oldest first, to the file's text.
    """

    path: str
    benchmarks: tuple[str, ...]
    draw: Callable[[list[Record]], str]

    def text(self, records: Sequence[Record]) -> str:
        """The picture, drawn from those of all records that are its own."""
        return self.draw([record for record in records if record["benchmark"] in self.benchmarks])

    def is_current(self, root: Path, records: Sequence[Record]) -> bool:
        """Whether the file was drawn from the records as they are."""
        path = root / self.path
        return path.exists() and path.read_text(encoding="utf-8") == self.text(records)

    def write(self, root: Path, records: Sequence[Record]) -> None:
        """Draw it anew."""
        (root / self.path).parent.mkdir(parents=True, exist_ok=True)
        (root / self.path).write_text(self.text(records), encoding="utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; without rows, a line that says that nothing is measured yet."""
    if not rows:
        return PENDING
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def section_of(text: str, heading: str) -> str:
    """A section of a document, up to the next heading of its level; "" where there is none."""
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return "" if found is None else found[1]


def typed_results(section: str) -> list[str]:
    """Numbers with a unit of time, rate, memory or gain that stand in a section's prose, outside tables made of records.

    Rates and sizes that a text defines, in code and formulas, are no results.
    """
    prose = _BLOCK.sub("", section)
    prose = re.sub(r"```.*?```|`[^`]*`|^ {4}.*$", "", prose, flags=re.DOTALL | re.MULTILINE)
    return [match[0] for match in _RESULT.finditer(prose)]


def rewritten(document: str, text: str, tables: Sequence[Table], records: Sequence[Record]) -> str:
    """A document's text with every table of it made anew.

    Args:
        document: its path in the repository.
        text: what it says now.
        tables: of all documents.
        records: of all benchmarks.

    Raises:
        ValueError: a table has no place in it, has two, or a place is no table's.
    """
    own = {table.marker: table for table in tables if table.document == document}
    opened = _OPENING.findall(text)
    closed = [match["marker"] for match in _BLOCK.finditer(text)]
    if opened != closed:
        raise ValueError(f"{document}: the tables {opened} begin, {closed} end: expected the same")
    if sorted(opened) != sorted(own):
        raise ValueError(f"{document} has places for the tables {sorted(opened)}, expected one for each of {sorted(own)}")
    return _BLOCK.sub(lambda match: f"{match[1]}{own[match['marker']].text(records)}\n{match[4]}", text)
