"""Many replicas, simulated with the router's real code: p95 against load, cache hits, a zone's loss, a rising load.

    python -m benchmarks.scaling.simulate                       everything, to 1,000 replicas; some minutes of one core
    python -m benchmarks.scaling.simulate --scenario zone       one of load, shares, zone, rise

GPU seconds are those predicted for an H100 (benchmarks/step/prediction.py) and, for encoding and decoding, assumed; nothing is
measured here. Arrivals and kinds of requests are the load generator's (benchmarks/serving/arrivals.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.arguments import BenchmarkParser, whole_number
from benchmarks.measure import write_record
from benchmarks.serving.arrivals import Arrival, arrivals
from benchmarks.serving.shares import quantile
from uso_engine.serving.ray.policy import RoutingSettings

from .requests import SimulatedRequest, mean_compute_s, simulated
from .simulation import Deployment, Outcome, Rule, Simulation

SCENARIOS = ("load", "shares", "zone", "rise")
RULES: tuple[Rule, ...] = ("ours", "two choices", "random")
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
FEW_LOADS = (0.7, 0.9, 0.95)
MANY = 100
"""Replicas beyond which fewer loads are tried."""
SHARES = (0.0, 0.1, 0.25, 0.5, 0.9)
LEAST = 64
"""Replicas for which requests are drawn at least: fewer would say little about p95."""
WARMING = 0.25
"""Of the requests: caches and queues fill, and what they see is not counted."""
WINDOW_S = 10.0


def draw(replicas: int, requests: int, load: float, seed: int) -> list[SimulatedRequest]:
    """A trace that keeps so many replicas busy for a share of their time, were everything cached."""
    trace = arrivals(requests, load * replicas / mean_compute_s(), seed)
    return ask(trace, seed)


def ask(trace: Sequence[Arrival], seed: int) -> list[SimulatedRequest]:
    """What is asked for: a few thousand styles, most requests for the popular ones; contents and prompts are mostly new."""
    return simulated(trace, styles=5_000, contents=50_000, prompts=20_000, seed=seed)


def summary(outcome: Outcome) -> dict[str, object]:
    """Seconds by kind, and counts."""
    ordered = sorted(outcome.ended)
    counted = ordered[int(WARMING * len(ordered)) :]
    kinds = {
        kind: {f"p{percent}_s": quantile([s for _, s, k in counted if k == kind], percent) for percent in (50, 95, 99)}
        for kind in sorted({kind for _, _, kind in counted})
    }
    return {
        "requests": len(outcome.ended),
        "p50_s": quantile([seconds for _, seconds, _ in counted], 50),
        "p95_s": quantile([seconds for _, seconds, _ in counted], 95),
        "kinds": kinds,
        "hits": outcome.hits / max(1, outcome.lookups),
        "busy": outcome.busy,
        "refused": outcome.refused,
        "run_again": outcome.run_again,
        "lost": outcome.lost,
    }


def windows(outcome: Outcome) -> list[dict[str, float]]:
    """Over time: p95 of the requests that came in a window, and replicas at its beginning."""
    end_s, found = max(at_s for at_s, _, _ in outcome.ended), []
    for number in range(int(end_s / WINDOW_S)):
        begin_s, until_s = number * WINDOW_S, (number + 1) * WINDOW_S
        inside = [seconds for at_s, seconds, _ in outcome.ended if begin_s <= at_s < until_s]
        there = [count for at_s, count in outcome.replicas if at_s <= begin_s]
        if inside:
            found.append({"seconds": begin_s, "p95_s": quantile(inside, 95), "requests": len(inside), "replicas": there[-1]})
    return found


def by_load(replicas: Sequence[int], each: int, seed: int) -> list[dict[str, object]]:
    """Every rule at every load."""
    found = []
    for count in replicas:
        for load in LOADS if count <= MANY else FEW_LOADS:
            trace = draw(count, each * max(count, LEAST), load, seed)
            for rule in RULES:
                outcome = Simulation(Deployment(count, rule=rule), trace).run()
                found.append({"replicas": count, "load": load, "rule": rule, **summary(outcome)})
    return found


def by_share(replicas: int, each: int, seed: int) -> list[dict[str, object]]:
    """What a load may differ by to count as equal."""
    trace = draw(replicas, each * replicas, 0.8, seed)
    found = []
    for share in SHARES:
        routing = RoutingSettings(equal_share=share, alternatives=0)
        outcome = Simulation(Deployment(replicas, routing=routing), trace).run()
        found.append({"replicas": replicas, "equal_share": share, **summary(outcome)})
    return found


def zone_loss(replicas: int, seed: int, *, lost_s: float = 120.0, end_s: float = 420.0) -> list[dict[str, object]]:
    """A third of the replicas is lost at once, at loads that the rest can and cannot carry."""
    found = []
    for load in (0.6, 0.8):
        per_s = load * replicas / mean_compute_s()
        trace = ask(arrivals(int(per_s * end_s), per_s, seed), seed)
        outcome = Simulation(Deployment(replicas, lost_zone_s=lost_s), trace).run()
        found.append({"replicas": replicas, "load": load, "lost_s": lost_s, "windows": windows(outcome), **summary(outcome)})
    return found


def rising_load(replicas: int, seed: int, *, most: int) -> dict[str, object]:
    """The load of a few replicas becomes three times as much, and less again; the autoscaler follows."""
    trace, begin_s = list[Arrival](), 0.0
    for load, seconds in ((0.6, 300.0), (1.8, 900.0), (0.6, 900.0)):
        per_s = load * replicas / mean_compute_s()
        part = arrivals(int(per_s * seconds), per_s, seed)
        trace += [Arrival(begin_s + one.at_s, one.size, len(trace) + place) for place, one in enumerate(part)]
        begin_s += seconds
    trace.sort(key=lambda one: one.at_s)
    outcome = Simulation(Deployment(replicas, most=most), ask(trace, seed)).run()
    return {"replicas": replicas, "most": most, "windows": windows(outcome), **summary(outcome)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "out")
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--replicas", type=whole_number, nargs="+", default=[8, 64, 1000], metavar="N", help="of load")
    parser.add_argument(
        "--each",
        type=whole_number,
        default=30,
        metavar="N",
        help="requests of each replica, of load and shares",
    )
    parser.add_argument(
        "--fleet", type=whole_number, default=63, metavar="N", help="replicas of shares and zone; a third of rise"
    )
    parser.add_argument("--seed", type=whole_number, default=1, metavar="N")
    options = parser.read(arguments)
    fleet, seed, out = options.fleet, options.seed, options.out
    for scenario in options.scenario:
        began = time.process_time()

        def record(cases: list[dict[str, object]], began: float = began) -> dict[str, object]:
            used_s = time.process_time() - began
            return {"device": "cpu", "seed": seed, "mean_compute_s": mean_compute_s(), "processor_s": used_s, "cases": cases}

        if scenario == "load":
            cases = by_load(options.replicas, options.each, seed)
            write_record("scaling_load", record(cases), out)
        elif scenario == "shares":
            cases = by_share(fleet, options.each, seed)
            write_record("scaling_shares", record(cases), out)
        elif scenario == "zone":
            cases = zone_loss(fleet, seed)
            write_record("scaling_zone", record(cases), out)
        else:
            cases = [rising_load(max(1, fleet // 3), seed, most=fleet)]
            write_record("scaling_rise", record(cases), out)
        print(f"{scenario}, {time.process_time() - began:.0f} s")
        for case in cases:
            print("  " + ", ".join(f"{key} {value}" for key, value in case.items() if key not in ("windows", "kinds")))


if __name__ == "__main__":
    main()
