"""The records that benchmarks write: reading them, and taking those of a GPU's campaign into the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .measure import RESULTS, cpu_kind, file_name

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


def latest(records: list[Record], *keys: str, by_machine: bool = True) -> list[Record]:
    """The last record of each combination of keys, in the order in which they first appear.

    Args:
        records: oldest first of each machine.
        keys: of each record.
        by_machine: whether another machine's is another case, as it is for every time.
    """
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        machine = (hardware(record),) if by_machine else ()
        case = (*machine, *(str(record[key]) for key in keys))
        # Each file is in order of time, but of two machines' files either may hold the later record.
        if case not in found or taken(record) >= taken(found[case]):
            found[case] = record
    return list(found.values())


def taken(record: Record) -> str:
    """When a record was taken, in UTC; empty where it does not say."""
    return str(record["machine"].get("taken", ""))


def hardware(record: Record) -> str:
    """The GPU that a record was taken on, or the CPU where there was none or it was not used."""
    machine = record["machine"]
    gpu = None if record.get("device") == "cpu" else machine.get("gpu")
    return str(gpu or cpu_kind(machine))


def clock_note(records: list[Record]) -> str:
    """What to say below a table in which a CPU's times are processor time."""
    threads = sorted({r["machine"]["threads"] for r in records if r.get("clock") == "process"})
    if not threads:
        return ""
    counts = " or ".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
    return f"\n\nCPU rows: processor time of {counts}, since the machine was shared with other work."
