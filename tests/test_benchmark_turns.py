"""Which runs count: those beside which a product was as fast as ever, whatever they took themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
import torch
from torch.nn import functional

from benchmarks import turns
from benchmarks.turns import MOST_ROUNDS, Product, Timings, Turns

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for; nobody waits."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every run takes so long."""
    now = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now) * seconds)


def numbered() -> Callable[[], int]:
    """A run that returns how often it ran before."""
    counter = iter(range(10_000))
    return lambda: next(counter)


def take(products_ms: Iterable[float], rounds: int = 2, names: str = "ab") -> Timings[int]:
    """Runs beside a product of these times; the last goes on."""
    times: Iterator[float] = iter(products_ms)
    last = [0.0]

    def product() -> float:
        last[0] = next(times, last[0])
        return last[0]

    return Turns({name: numbered() for name in names}, product).take(rounds)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_product_is_timed_before_between_and_after_all_runs(rounds: int) -> None:
    """Two turns of it next to each other would say nothing of the time that the runs took."""
    seen: list[str] = []

    def product() -> float:
        seen.append("product")
        return 1.0

    Turns({name: partial(seen.append, name) for name in ("one", "other")}, product).take(rounds)
    there = ["product", "one", "product", "other", "product"]
    assert seen == [name for turn in range(rounds) for name in (there[::-1] if turn % 2 else there)]


def test_on_a_machine_that_keeps_its_rate_every_run_counts() -> None:
    taken = take([1.0, 1.1, 1.0, 1.14, 1.15])
    assert taken.found == {"a": [0, 1], "b": [0, 1]} and taken.left_out == 0
    assert taken.product_ms["p20_ms"] == 1.1 and taken.product_ms["p80_ms"] == 1.15


@pytest.mark.parametrize(
    ("products_ms", "found", "left_out"),
    [
        # before a, after a and before b, after b; the second round is b, then a.
        ([1, 1, 1.2, 1, 1, 1, 1, 1, 1], {"a": [0, 1, 2], "b": [1, 2]}, 1),
        ([1.2, 1, 1, 1, 1, 1, 1, 1, 1], {"a": [1, 2], "b": [0, 1, 2]}, 1),
        # Between a and b it was slow, and once more when asked again.
        ([1, 1.2, 1.2, 1, 1, 1, 1, 1, 1, 1], {"a": [1, 2], "b": [1, 2]}, 2),
        # When asked again it had its rate: that is what b began with.
        ([1, 1.2, 1, 1, 1, 1, 1, 1, 1, 1], {"a": [1, 2], "b": [0, 1, 2]}, 1),
        # What seemed its rate was not: one turn was faster, and all before it are measured by that one.
        ([1.2, 1.2, 1.2, 1.2, 1.2, 1.0], {"a": [2, 3], "b": [2, 3]}, 4),
    ],
)
def test_runs_that_met_another_rate_are_timed_again(
    products_ms: list[float], found: dict[str, list[int]], left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 0.0)
    taken = take(products_ms)
    assert taken.found == found and taken.left_out == left_out
    assert taken.product_ms["p80_ms"] <= 1.15


def test_a_runs_own_time_does_not_decide() -> None:
    assert take([1.0], rounds=3, names="abc").found == {name: [0, 1, 2] for name in "abc"}


def test_where_too_few_runs_count_all_of_them_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the product's times say that there is nothing to be compared."""
    clock(monkeypatch, 0.0)
    taken = take([1.0, *[1.0, 2.0] * 100])
    assert {name: len(found) for name, found in taken.found.items()} == {"a": 2 * MOST_ROUNDS, "b": 2 * MOST_ROUNDS}
    assert taken.left_out == 0 and taken.product_ms["p80_ms"] == 2


def test_a_machine_that_is_slow_throughout_keeps_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fast turn does not make it another machine."""
    clock(monkeypatch, 0.0)
    taken = take([2.0, 2.0, 1.0, *[2.0] * 1000])
    assert taken.product_ms == {"median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0}


def test_the_rate_is_waited_for_but_no_longer_than_the_runs_took(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    clock(monkeypatch, 1.0)
    taken = take([1.0, 1.3, 1.3, 1.0, 1.0], names="a", rounds=1)
    assert taken.found == {"a": [1]} and sum(slept) == pytest.approx(turns._WAIT_S)
    slept.clear()
    take([1.0, *[3.0] * 1000], names="ab", rounds=1)
    assert sum(slept) == pytest.approx(2 * MOST_ROUNDS, abs=turns._WAIT_S)


def test_a_turn_is_several_products_of_the_runs_type(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(CPU, torch.float64, "process")
    assert {operand.dtype for operand in product._operands} == {torch.float64}
    seen: list[str] = []
    monkeypatch.setattr(functional, "linear", lambda *operands: seen.append("product"))
    assert product.time() > 0 and len(seen) == turns._PER_TURN
