"""What tables say of the cases during which a machine did not keep its rate (`benchmarks.turns`)."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record, hardware
from benchmarks.turns import is_steady, spread


def left_out(records: Sequence[Record], shown: Sequence[Record]) -> str:
    """Which cases tables leave out, by machine, and why; empty where there are none.

    Args:
        records: all.
        shown: those in the tables.
    """
    seen = {(*_run(record), record["case"]) for record in shown}
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        if not is_steady(record) and (*_run(record), record["case"]) not in seen:
            lines.setdefault(_run(record), {})[record["case"]] = spread(record["product_ms"])
    told = (
        f"Left out, {machine}, {size}, {dtype}: {', '.join(cases)}. Between their requests the same product took up to "
        f"{max(cases.values()):.1f} times as long: the machine did not keep its rate."
        for (machine, size, dtype), cases in lines.items()
    )
    return "".join(f"\n\n{line}" for line in told)


def _run(record: Record) -> tuple[str, str, str]:
    return hardware(record), record["size"], record["dtype"]
