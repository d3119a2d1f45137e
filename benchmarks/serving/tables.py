"""Tables of serving: policies under load, what deciding costs, a request by itself, and what HTTP offers and costs."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest

from .http_tables import HTTP_TABLES

SIZES = ("small", "medium", "large")


def policies(records: list[Record]) -> str:
    """Seconds to the result by size and policy, and the share of one request at a time's."""
    rows = []
    for record in _newest(records):
        alone = record["policies"]["one at a time"]["sizes"]
        for policy, found in record["policies"].items():
            cells = []
            for name in SIZES:
                size = found["sizes"].get(name)
                if size is None:
                    cells.append("none")
                    continue
                times = " / ".join(f"{size[key]:.1f}" for key in ("p50_s", "p95_s", "p99_s"))
                cells.append(f"{times} ({size['p95_s'] / alone[name]['p95_s']:.2f})")
            share = f"{record.get('arrival_share', 0.5):.2f}" if policy == "ours" else ""
            trace = f"{_arrivals(record)}, {sum(size['requests'] for size in found['sizes'].values())} requests"
            rows.append([hardware(record), trace, f"{record['seed']}", policy, share, *cells, f"{found['requests_per_s']:.2f}"])
    sizes = [f"{name}: p50 / p95 / p99, s (p95, times one at a time)" for name in SIZES]
    return markdown(["machine", "arrivals", "seed", "policy", "share in order of arrival", *sizes, "requests/s"], rows)


def deciding(records: list[Record]) -> str:
    """What deciding about steps and forming their batches takes, of the time of the steps."""
    rows = []
    for record in _newest(records):
        found = record["policies"]["ours"]
        shares = [found["deciding_share"], found["forming_share"]]
        counts = [f"{found['steps']}", f"{found['batches']}", f"{1e3 * found['step_s'] / found['steps']:.0f}"]
        cells = [f"{100 * share:.2f} %" for share in (*shares, sum(shares))]
        rows.append([hardware(record), _arrivals(record), f"{record['seed']}", *counts, *cells])
    header = ["machine", "arrivals", "seed", "steps", "batches formed", "mean step, ms", "deciding", "forming", "both"]
    return markdown(header, rows)


def shares(records: list[Record]) -> str:
    """What a share of the steps in order of arrival does to each size, over many traces."""
    rows = []
    for record in latest(records, "burst", "arrival_share"):
        cells = []
        for name in SIZES:
            size = record["sizes"][name]
            over = f"; {size['over']} of {size['traces']} over" if "over" in size else ""
            cells.append(f"{size['median']:.2f} to {size['largest']:.2f}{over}")
        trace = f"{_arrivals(record)}, {record['requests']} requests, {record['seeds']} seeds"
        rows.append([hardware(record), trace, f"{record['arrival_share']:.2f}", *cells])
    sizes = [f"{name}: p95, times one at a time, median to largest" for name in SIZES]
    return markdown(["machine", "arrivals", "share in order of arrival", *sizes], rows)


def _newest(records: list[Record]) -> list[Record]:
    return latest(records, "burst", "seed")


def _arrivals(record: Record) -> str:
    return "Poisson" if record["burst"] == 1 else f"bursts of {record['burst']}"


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
    Table("docs/serving.md", "shares", ("serving_shares",), shares),
    Table("docs/serving.md", "deciding", ("serving",), deciding),
    Table("docs/serving.md", "single", ("serving_single",), single),
    *HTTP_TABLES,
)
