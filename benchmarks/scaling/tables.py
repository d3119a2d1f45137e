"""Tables of scaling: what the simulator gave, what a GPU should do in an hour, and what a local Ray was seen to do."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest
from benchmarks.serving.arrivals import SIZES

from .requests import SCALED, compute_s, step_s


def _cases(records: list[Record]) -> list[Record]:
    found = latest(records, "benchmark", by_machine=False)
    return list(found[-1]["cases"]) if found else []


def load(records: list[Record]) -> str:
    """p95 and cache hits by replicas, load and rule."""
    cases = _cases(records)
    rules = list(dict.fromkeys(case["rule"] for case in cases))
    rows = []
    for count, share in dict.fromkeys((case["replicas"], case["load"]) for case in cases):
        own = {case["rule"]: case for case in cases if (case["replicas"], case["load"]) == (count, share)}
        found = [f"{own[rule]['p95_s']:.1f} ({100 * own[rule]['hits']:.0f} %)" if rule in own else "" for rule in rules]
        rows.append([f"{count:,}", f"{share:g}", *found])
    return markdown(["replicas", "load", *(f"{rule}: p95, s (cache hits)" for rule in rules)], rows)


def shares(records: list[Record]) -> str:
    """What counts as equal."""
    rows = [
        [
            f"{c['equal_share']:g}",
            f"{c['p50_s']:.2f}",
            f"{c['p95_s']:.2f}",
            f"{100 * c['hits']:.1f} %",
            f"{100 * c['busy']:.1f} %",
        ]
        for c in _cases(records)
    ]
    return markdown(["`equal_share`", "p50, s", "p95, s", "cache hits", "GPU time used"], rows)


def zone(records: list[Record]) -> str:
    """A third of the replicas lost at once."""
    rows = []
    for case in _cases(records):
        before = [w["p95_s"] for w in case["windows"] if w["seconds"] < case["lost_s"]]
        after = [w for w in case["windows"] if w["seconds"] >= case["lost_s"] - 10]
        usual = sorted(before)[len(before) * 3 // 4]
        worst = max(w["p95_s"] for w in after)
        slow = [w["seconds"] for w in after if w["p95_s"] > 1.5 * usual]
        recovered = f"{max(slow) + 10 - case['lost_s']:.0f}" if slow else "0"
        counts = [f"{case['requests']:,}", f"{case['run_again']}", f"{case['lost']}", f"{case['refused']}"]
        rows.append([f"{case['replicas']}", f"{case['load']:g}", *counts, f"{usual:.1f}", f"{worst:.1f}", recovered])
    header = ["replicas", "load", "requests", "run again", "lost", "refused", "p95 before, s", "worst p95 of 10 s after, s"]
    return markdown([*header, "seconds until it is below 1.5 times"], rows)


def rise(records: list[Record]) -> str:
    """Three times the load, and less again."""
    rows = []
    for case in _cases(records):
        most = max(w["replicas"] for w in case["windows"])
        last = case["windows"][-1]["replicas"]
        worst = max(w["p95_s"] for w in case["windows"])
        counts = [f"{case['requests']:,}", f"{case['refused']}", f"{case['lost']}"]
        rows.append([f"{case['replicas']}", f"{most:.0f}", f"{last:.0f}", *counts, f"{case['p95_s']:.1f}", f"{worst:.1f}"])
    header = ["replicas before", "most", "at the end", "requests", "refused", "lost", "p95, s", "worst p95 of 10 s, s"]
    return markdown(header, rows)


def capacity(records: list[Record]) -> str:
    """What an H100 should do in an hour, by kind of request; from the prediction of a step, so computed from the code."""
    rows = []
    for size in SIZES:
        side, steps = SCALED[size.name]
        tokens, seconds = step_s(size.name, size.references)
        whole = compute_s(size.name, size.references)
        pictures = {0: "none", 1: "content", 2: "content, style"}[size.references]
        speed = f"{tokens / seconds:,.0f}"
        rows.append([f"{side}", f"{steps}", pictures, f"{tokens:,}", f"{1e3 * seconds:.0f}", speed, f"{3600 / whole:,.0f}"])
    header = ["side", "steps", "pictures", "tokens of a step", "step, ms", "tokens/s", "requests/h at full load"]
    return markdown(header, rows)


def local_ray(records: list[Record]) -> str:
    """What the tests with a real Ray saw."""
    rows = [
        [r["check"], r["found"], f"Ray {r['ray']}, {r['replicas']} of {r['config']}", hardware(r)]
        for r in latest(records, "check", by_machine=False)
    ]
    return markdown(["what was done", "what was seen", "with", "machine"], rows)


_DOCUMENT = "docs/scaling.md"
TABLES = (
    Table(_DOCUMENT, "scaling capacity", (), capacity),
    Table(_DOCUMENT, "scaling load", ("scaling_load",), load),
    Table(_DOCUMENT, "scaling shares", ("scaling_shares",), shares),
    Table(_DOCUMENT, "scaling zone", ("scaling_zone",), zone),
    Table(_DOCUMENT, "scaling rise", ("scaling_rise",), rise),
    Table(_DOCUMENT, "scaling local ray", ("scaling_local_ray",), local_ray),
)
