"""What a replica counts for its reports."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.serving.ray.demand import Demand
from uso_engine.serving.ray.usage import Meter, Period, Usage


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def demand(name: str, work: int, *keys: str) -> Demand:
    return Demand(name, work, prompts=frozenset(keys))


def test_work_by_sender() -> None:
    usage = Usage(Clock())
    one, two = demand("1", 10), demand("2", 20)
    usage.begin(one, "a")
    usage.begin(two, "a")
    usage.begin(demand("3", 5), "b")
    assert usage.work == {"a": 30, "b": 5}
    usage.end(one, "a", encoded=True)
    usage.end(two, "a", encoded=False)
    assert usage.work == {"b": 5}


def test_the_latest_conditions_are_remembered_where_they_were_encoded() -> None:
    usage = Usage(Clock(), most_keys=2)
    for name, encoded in (("x", True), ("y", True), ("x", True), ("z", True), ("refused", False)):
        one = demand(name, 1, name)
        usage.begin(one, "a")
        usage.end(one, "a", encoded=encoded)
    assert usage.keys == {"x", "z"}


def test_speed_and_occupancy_are_of_the_time_since_the_last_look() -> None:
    clock, tokens = Clock(), [0]
    usage = Usage(clock)
    meter, other = (Meter(usage, lambda: tokens[0], clock) for _ in range(2))
    clock.now_s += 4
    one, two = demand("1", 1), demand("2", 1)
    usage.begin(one, "a")
    clock.now_s += 2
    usage.begin(two, "a")
    usage.end(one, "a", encoded=True)
    tokens[0] = 600
    clock.now_s += 1
    assert meter.read() == Period(3 / 7, 200.0)
    clock.now_s += 1
    usage.end(two, "a", encoded=True)
    clock.now_s += 9
    assert meter.read() == Period(0.1, None)
    assert meter.read() == Period(0.0, None)
    assert other.read() == Period(4 / 17, 150.0)
