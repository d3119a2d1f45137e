"""The table of docs/serving.md from the records of `benchmarks.serving.load`."""

from __future__ import annotations

from benchmarks.records import Record, hardware, latest, table


def serving_table(records: list[Record]) -> str:
    """Seconds to the result by size and policy, and the share of one request at a time's."""
    rows = []
    for record in latest(records, "serving", "burst"):
        alone = record["policies"]["one at a time"]["sizes"]
        arrivals = "Poisson" if record["burst"] == 1 else f"bursts of {record['burst']}"
        for policy, found in record["policies"].items():
            cells = []
            for name, size in found["sizes"].items():
                times = " / ".join(f"{size[key]:.1f}" for key in ("p50_s", "p95_s", "p99_s"))
                cells.append(f"{times} ({size['p95_s'] / alone[name]['p95_s']:.2f})")
            rows.append([hardware(record), arrivals, policy, *cells, f"{found['requests_per_s']:.2f}"])
    sizes = [f"{name}: p50 / p95 / p99, s (p95, times one at a time)" for name in ("small", "medium", "large")]
    return table(["machine", "arrivals", "policy", *sizes, "requests/s"], rows) if rows else "Not measured yet."
