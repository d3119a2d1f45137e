"""The records that benchmarks write: reading them, and taking those of a GPU's campaign into the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .measure import RESULTS, file_name

Record = dict[str, Any]


def load(folder: Path = RESULTS) -> list[Record]:
    """Every record of every machine, oldest first in each file."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines() if line.strip()]
    return [record for record in map(json.loads, lines) if "benchmark" in record]


def take(source: Path, folder: Path = RESULTS) -> tuple[int, int]:
    """Append what a campaign recorded on a GPU to that GPU's file.

    Args:
        source: the campaign's folder, or a file of JSON lines.
        folder: of the files.

    Returns:
        Records taken, and left out: those of a rehearsal on a CPU, and those that are there already.

    Raises:
        SystemExit: there are no records.
    """
    path = source / "records.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise SystemExit(f"no records in {source}: expected {path}")
    taken = left = 0
    for line in path.read_text().splitlines():
        record = json.loads(line)
        target = folder / f"{file_name(hardware(record))}.jsonl"
        known = target.read_text().splitlines() if target.exists() else []
        if not record["machine"].get("gpu") or record.get("device", "cuda") != "cuda" or line in known:
            left += 1
            continue
        with target.open("a") as file:
            file.write(line + "\n")
        taken += 1
    return taken, left


def latest(records: list[Record], benchmark: str, *keys: str) -> list[Record]:
    """The last record of each combination of machine and keys, in the order in which they first appear."""
    found: dict[tuple[object, ...], Record] = {}
    for record in records:
        if record["benchmark"] == benchmark:
            found[(hardware(record), *(str(record[key]) for key in keys))] = record
    return list(found.values())


def hardware(record: Record) -> str:
    """The GPU that a record was taken on, or the CPU where there was none."""
    machine = record["machine"]
    return str(machine.get("gpu") or machine["cpu"])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
