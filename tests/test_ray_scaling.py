"""How many replicas there should be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uso_engine.serving.ray.scaling import ScalingSettings, wanted_replicas

SETTINGS = ScalingSettings(queue_s=20.0, busy=0.7)


def wanted(replicas: int, *, waiting_s: float = 0.0, busy: float = 1.0, queued: float = 0.0) -> int:
    return wanted_replicas(replicas, waiting_s=waiting_s, busy=busy, queued=queued, settings=SETTINGS, least=1, most=10)


def test_what_waits_too_long_brings_as_many_as_it_needs() -> None:
    assert wanted(2, waiting_s=40.0) == 2
    assert wanted(2, waiting_s=40.1) == 3
    assert wanted(2, waiting_s=130.0) == 7
    assert wanted(2, waiting_s=1e6) == 10


def test_a_busy_replica_without_a_queue_brings_none() -> None:
    assert wanted(1, waiting_s=10.0, busy=1.0) == 1


def test_requests_that_no_replica_has_taken_bring_one() -> None:
    assert wanted(2, waiting_s=1.0, queued=3) == 3


def test_idle_replicas_go() -> None:
    assert wanted(4, busy=0.0) == 1
    assert wanted(4, busy=0.35) == 2
    assert wanted(4, busy=0.6, waiting_s=10.0) == 4


def test_from_none_one_is_wanted() -> None:
    assert wanted(0) == 1


@given(st.integers(0, 50), st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 100), st.integers(0, 5), st.integers(0, 40))
def test_bounds_hold_and_more_work_never_means_fewer(
    replicas: int, waiting_s: float, busy: float, queued: float, least: int, more: int
) -> None:
    def ask(waiting_s: float) -> int:
        bounds = {"least": least, "most": least + more}
        return wanted_replicas(replicas, waiting_s=waiting_s, busy=busy, queued=queued, settings=SETTINGS, **bounds)

    found = ask(waiting_s)
    assert least <= found <= least + more and ask(waiting_s * 2) >= found


@pytest.mark.parametrize("fields", [{"queue_s": 0.0}, {"queue_s": float("inf")}, {"busy": 0.0}, {"busy": 1.5}])
def test_settings_that_make_no_sense(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"queue_s|busy"):
        ScalingSettings(**fields)
