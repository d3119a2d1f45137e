"""Tables of serving: policies under load, a request by itself, and what HTTP offers and costs."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest

from .http_tables import HTTP_TABLES


def policies(records: list[Record]) -> str:
    """Seconds to the result by size and policy, and the share of one request at a time's."""
    rows = []
    for record in latest(records, "burst"):
        alone = record["policies"]["one at a time"]["sizes"]
        arrivals = "Poisson" if record["burst"] == 1 else f"bursts of {record['burst']}"
        for policy, found in record["policies"].items():
            cells = []
            for name, size in found["sizes"].items():
                times = " / ".join(f"{size[key]:.1f}" for key in ("p50_s", "p95_s", "p99_s"))
                cells.append(f"{times} ({size['p95_s'] / alone[name]['p95_s']:.2f})")
            rows.append([hardware(record), arrivals, policy, *cells, f"{found['requests_per_s']:.2f}"])
    sizes = [f"{name}: p50 / p95 / p99, s (p95, times one at a time)" for name in ("small", "medium", "large")]
    return markdown(["machine", "arrivals", "policy", *sizes, "requests/s"], rows)


def single(records: list[Record]) -> str:
    """A request by itself through the loop's threads, and stage by stage in one thread."""
    rows = [
        [
            hardware(r),
            f"{r['side']}",
            *(f"{r['times'][name]['median_ms']:.0f}" for name in ("straight", "loop")),
            f"{r['ratio']:.3f}",
            f"{100 * r['shares']['form']:.2f} %",
        ]
        for r in latest(records, "side")
    ]
    return markdown(["machine", "side", "one thread, ms", "through the loop, ms", "ratio", "forming a batch, of a step"], rows)


TABLES = (
    Table("docs/serving.md", "serving", ("serving",), policies),
    Table("docs/serving.md", "single", ("serving_single",), single),
    *HTTP_TABLES,
)
