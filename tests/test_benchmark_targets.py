"""What was aimed at is held against what any engine could reach."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compare.tables import bound, targets


@pytest.mark.parametrize(
    ("times", "of_floor", "verdict"),
    [
        (2.6, 0.3, "2.60 times ours; 2.5 is reached."),
        # Of 1000 ms 800 are steps; at the floor they would take 240, 320 or 400.
        (1.4, 0.3, "1.40 times ours; 2.5 is missed: at the floor it would take 3.18 to 3.41 times ours."),
        (1.3, 0.5, "1.30 times ours; 2.5 is out of reach: at the floor it would take 2.17 to 2.33 times ours."),
        (
            1.25,
            0.4,
            "1.25 times ours; 2.5 is out of reach in 1 of 2 requests: at the floor it would take 2.40 to 2.60 times ours.",
        ),
    ],
)
@pytest.mark.parametrize("way", ["authors' way", "authors' code"])
def test_what_was_aimed_at_is_held_against_the_floor(way: str, times: float, of_floor: float, verdict: str) -> None:
    machine = {"cpu": "a CPU", "taken": "2026-11-27 12:00:00"}

    def record(way: str, case: int, times_ours: float) -> dict[str, Any]:
        timings = {"request_ms": {"median_ms": 1e3 * times_ours}, "step_ms": {"median_ms": 400.0 * times_ours}}
        common = {"size": "small", "dtype": "bfloat16", "machine": machine, "case": str(case), "steps": 2}
        return {**common, **timings, "way": way, "times_ours": times_ours, "of_floor": of_floor / times_ours}

    records = [record("ours, bf16", i, 1.0) for i in range(2)]
    records += [record(way, i, times + 0.1 * i) for i in range(2)]
    assert targets(records).strip() == f"- a CPU, small, bfloat16: {way} takes at least {verdict}"


def test_several_evaluations_a_step_are_all_steps() -> None:
    """A way that makes two evaluations in each of two steps could be faster in all four."""
    timings = {"request_ms": {"median_ms": 1000.0}, "step_ms": {"median_ms": 200.0}, "steps": 2, "of_floor": 0.5}
    assert bound({"request_ms": {"median_ms": 1500.0}}, {**timings, "evaluations": 4}) == pytest.approx(1500 / 600)
    assert bound({"request_ms": {"median_ms": 1500.0}}, timings) == pytest.approx(1500 / 800)
