"""How large a share of the steps goes in order of arrival: the scheduler over many seeded traces, with measured times of steps.

    python -m benchmarks.serving.shares

A request of each size is run by itself first; then nothing is computed any more, and the scheduler alone decides in a clock
that these times move on. Company is given no gain. `benchmarks.serving.load` computes every step: an hour for as many.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch

from benchmarks.arguments import BenchmarkParser, amount, whole_number
from benchmarks.measure import write_record
from uso_engine import USOEngine
from uso_engine.scheduling import scheduler
from uso_engine.scheduling.scheduler import Scheduler, Ticket

from .arrivals import SIZES, Arrival, Size, arrivals
from .policies import Player

OWED = (1, 2, 3)
BURSTS = (1, 8)
MOST = {"small": 0.5, "large": 1.3}
"""What is aimed at: p95 in times of one request at a time's."""
Latencies = dict[str, list[float]]


@dataclass(frozen=True)
class Cost:
    """Of a request of a size: tokens and seconds of a step, and seconds before the first and after the last together."""

    tokens: int
    step_s: float
    beside_s: float


def quantile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def arrival_share(owed: float) -> float:
    """The share in order of arrival that so many tokens owed for each elsewhere come to."""
    return owed / (1 + owed)


def cost(engine: USOEngine, size: Size) -> Cost:
    """Of the second request of a size; the first one warms up."""
    player = Player(engine, "one at a time")
    first = player.play([Arrival(0.0, size, 1)])
    steps_s, tokens = first.step_s, first.tokens
    both = player.play([Arrival(first.end_s, size, 2)])
    step_s = (both.step_s - steps_s) / size.steps
    return Cost((both.tokens - tokens) // size.steps, step_s, both.served[0].latency_s - size.steps * step_s)


def one_after_another(trace: Sequence[Arrival], costs: dict[str, Cost]) -> Latencies:
    """Seconds to the result by size."""
    now_s, found = 0.0, defaultdict[str, list[float]](list)
    for arrival in trace:
        one = costs[arrival.size.name]
        now_s = max(now_s, arrival.at_s) + one.beside_s + arrival.size.steps * one.step_s
        found[arrival.size.name].append(now_s - arrival.at_s)
    return found


def scheduled(trace: Sequence[Arrival], costs: dict[str, Cost], step_tokens: int) -> Latencies:
    """Seconds to the result by size, under the scheduler."""
    made, now_s, coming = Scheduler(step_tokens, 0.0), 0.0, deque(trace)
    running: dict[Ticket, Arrival] = {}
    arrived, through, oldest_next = list[Arrival](), deque[Arrival](), True
    found = defaultdict[str, list[float]](list)
    while coming or arrived or running or through:
        if not (arrived or running or through):
            now_s = max(now_s, coming[0].at_s)
        while coming and coming[0].at_s <= now_s:
            arrived.append(coming.popleft())
        # As the loop does: between two steps one is decoded and one encoded, in turn the oldest and the smallest.
        if through:
            arrival = through.popleft()
            now_s += costs[arrival.size.name].beside_s / 2
            found[arrival.size.name].append(now_s - arrival.at_s)
        if arrived:
            arrival = arrived[0] if oldest_next else min(arrived, key=lambda one: costs[one.size.name].tokens)
            arrived.remove(arrival)
            oldest_next, one = not oldest_next, costs[arrival.size.name]
            now_s += one.beside_s / 2
            ticket = Ticket(one.tokens, arrival.size.steps, arrival.at_s, ready=True)
            made.add(ticket)
            running[ticket] = arrival
        chosen = made.choose(now_s)
        now_s += sum(costs[running[ticket].size.name].step_s for ticket in chosen)
        made.step_taken(chosen)
        for ticket in [ticket for ticket in chosen if not ticket.steps_left]:
            made.remove(ticket)
            through.append(running.pop(ticket))
    return found


def ratios(traces: Sequence[Sequence[Arrival]], costs: dict[str, Cost], step_tokens: int, owed: int) -> Latencies:
    """By size, for each trace that has it: p95 in times of one request at a time's."""
    found = defaultdict[str, list[float]](list)
    with patch.object(scheduler, "OWED_PER_TOKEN", owed):
        for trace in traces:
            ours, alone = scheduled(trace, costs, step_tokens), one_after_another(trace, costs)
            for name, latencies in ours.items():
                found[name].append(quantile(latencies, 95) / quantile(alone[name], 95))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "out")
    parser.add_argument("--config", default="uso-tiny")
    parser.add_argument("--requests", type=whole_number, default=160, metavar="N", help="in each trace")
    parser.add_argument("--load", type=amount, default=0.8, metavar="SHARE", help="of what one request at a time achieves")
    parser.add_argument("--seeds", type=whole_number, default=60, metavar="N", help="traces of each kind")
    options = parser.read(arguments)
    torch.set_num_threads(1)
    with USOEngine.from_config(options.config, device="cpu") as engine:
        costs = {size.name: cost(engine, size) for size in SIZES}
        step_tokens = engine.config.queue.max_step_tokens
    service_s = sum(size.share * (costs[size.name].beside_s + size.steps * costs[size.name].step_s) for size in SIZES)
    measured = {name: vars(one) for name, one in costs.items()}
    for burst in BURSTS:
        seeds = range(1, options.seeds + 1)
        traces = [arrivals(options.requests, options.load / service_s, seed, burst=burst) for seed in seeds]
        for owed in OWED:
            found = ratios(traces, costs, step_tokens, owed)
            sizes = {
                name: {"median": quantile(values, 50), "largest": max(values), "traces": len(values)}
                | ({"over": sum(value > MOST[name] for value in values)} if name in MOST else {})
                for name, values in found.items()
            }
            drawn = {"burst": burst, "load": options.load, "requests": options.requests, "seeds": options.seeds}
            record = {**drawn, "arrival_share": arrival_share(owed), "costs": measured, "clock": "process", "sizes": sizes}
            write_record("serving_shares", record, options.out)
            print(burst, f"{arrival_share(owed):.2f}", sizes)


if __name__ == "__main__":
    main()
