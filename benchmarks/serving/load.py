"""Many requests at once: time to the result by size, under three policies, on the same trace in the same run.

    python -m benchmarks.serving.load                         uso-tiny on a CPU, Poisson arrivals and bursts
    python -m benchmarks.serving.load --plot occupancy.png    how many requests took each step

The rate is a share of what one request at a time achieves, which is measured first. Every image is compared with that of the
other policies: a policy that changes one is not reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.arguments import BenchmarkParser, amount, whole_number
from benchmarks.measure import write_record
from uso_engine import USOEngine
from uso_engine.scheduling.scheduler import OWED_PER_TOKEN

from .arrivals import SIZES, Arrival, arrivals
from .occupancy import draw_occupancy
from .policies import POLICIES, Player, Policy, Replay
from .shares import arrival_share, quantile

QUANTILES = (50, 95, 99)


def mean_service_s(engine: USOEngine) -> float:
    """Seconds of a request by itself, over the sizes' shares; the second of each counts."""
    mean = 0.0
    for size in SIZES:
        trace = [Arrival(1e3 * i, size, i + 1) for i in range(2)]
        mean += size.share * Player(engine, "one at a time").play(trace).served[-1].latency_s
    return mean


def summary(replay: Replay) -> dict[str, object]:
    """Seconds by size, and what the whole trace took."""
    sizes = {}
    for size in SIZES:
        served = [entry for entry in replay.served if entry.arrival.size is size]
        if not served:
            continue
        latency = {f"p{percent}_s": quantile([entry.latency_s for entry in served], percent) for percent in QUANTILES}
        queued = quantile([entry.begun_s - entry.arrival.at_s for entry in served], 95)
        sizes[size.name] = {"requests": len(served), **latency, "queue_p95_s": queued}
    steps = [members for _, members in replay.occupancy]
    return {
        "sizes": sizes,
        "requests_per_s": len(replay.served) / replay.end_s,
        "occupancy": sum(steps) / len(steps),
        "steps": len(steps),
        "batches": replay.batches,
        "step_s": replay.step_s,
        "deciding_share": replay.deciding_s / replay.step_s,
        "forming_share": replay.forming_s / replay.step_s,
    }


def compare(engine: USOEngine, trace: list[Arrival], policies: Sequence[Policy]) -> dict[Policy, Replay]:
    """The trace under policies, one of them "one at a time".

    Raises:
        SystemExit: a policy changed an image or lost a request.
    """
    replays = {policy: Player(engine, policy).play(trace) for policy in policies}
    for policy, replay in replays.items():
        if replay.pictures != replays["one at a time"].pictures or len(replay.pictures) != len(trace):
            raise SystemExit(f"the policy {policy!r} changed an image, or a request was lost")
    return replays


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "out")
    parser.add_argument("--config", default="uso-tiny")
    parser.add_argument("--requests", type=whole_number, default=160, metavar="N", help="in each trace")
    parser.add_argument("--load", type=amount, default=0.8, metavar="SHARE", help="of what one request at a time achieves")
    shown = "requests that come at once, one trace each"
    parser.add_argument("--burst", type=whole_number, nargs="+", default=[1, 8], metavar="N", help=shown)
    parser.add_argument("--seed", type=whole_number, nargs="+", default=[1, 2, 3], metavar="N", help="of traces, one each")
    parser.add_argument("--no-static", action="store_true", help="leave static batching out")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG file")
    options = parser.read(arguments)
    torch.set_num_threads(1)
    policies: list[Policy] = [policy for policy in POLICIES if not (options.no_static and policy == "static")]
    with USOEngine.from_config(options.config, device="cpu") as engine:
        service_s = mean_service_s(engine)
        for burst, seed in product(options.burst, options.seed):
            trace = arrivals(options.requests, options.load / service_s, seed, burst=burst)
            started = time.time()
            replays = compare(engine, trace, policies)
            summaries = {policy: summary(replay) for policy, replay in replays.items()}
            drawn = {"burst": burst, "seed": seed, "load": options.load, "service_s": service_s, "requests": len(trace)}
            record = {**drawn, "clock": "process", "arrival_share": arrival_share(OWED_PER_TOKEN), "policies": summaries}
            write_record("serving", record, options.out)
            print(f"bursts of {burst}, seed {seed}, {time.time() - started:.0f} s")
            for policy, found in summaries.items():
                print(f"  {policy}: {found}")
            if options.plot is not None:
                draw_occupancy(replays, options.plot.with_stem(f"{options.plot.stem}-{burst}-{seed}"))


if __name__ == "__main__":
    main()
