"""Runs timed in turn while the machine keeps its rate, and those that met another rate timed again.

Neighbours that share a core's matrix unit, a limit of power, another program: they change a machine's rate within seconds, and
then no ratio of medians means what it says. So a product of fixed size is timed before, between and after all runs, and a run
counts only where the product beside it, on both sides, was about as fast as it ever was. A run's own time never decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.nn import functional as F

from benchmarks.measure import Clock, summarise, time_once
from benchmarks.records import Record
from uso_kernels.cpu import widens

MOST_SPREAD = 1.15
"""How much longer than its fastest turn the product may take beside a run that counts."""
MOST_ROUNDS = 4
"""Times the rounds asked for, after which runs are no longer repeated."""
_PER_TURN = 8
_WAIT_S = 0.5

T = TypeVar("T")


class Product:
    """Several products of one size, of the type that runs compute in.

    Args:
        device: where.
        dtype: of the runs.
        clock: as `benchmarks.measure.interleave` takes it.
    """

    @torch.no_grad()
    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
        dtype = torch.float32 if widens(torch.empty(0, dtype=dtype, device=device)) else dtype
        n = 8192 if device.type == "cuda" else 1024
        self._operands = [torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)]
        self._device, self._clock = device, clock
        self._multiply()  # A first one chooses and compiles.

    def time(self) -> float:
        """Milliseconds of one turn of them; it ends when the device has ended."""
        # A GPU's by the clock, too: its end is waited for.
        return time_once(self._multiply, torch.device("cpu"), self._clock)

    @torch.no_grad()
    def _multiply(self) -> None:
        for _ in range(_PER_TURN):
            F.linear(*self._operands)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Turn(NamedTuple, Generic[T]):
    """One run: what it returned, and milliseconds of the product at its slower side."""

    found: T
    product_ms: float


@dataclass(frozen=True)
class Timings(Generic[T]):
    """What counts.

    Args:
        found: what the runs returned, in the order of time, by name.
        product_ms: median, p20 and p80 of the product beside them.
        left_out: how many runs do not count.
    """

    found: dict[str, list[T]]
    product_ms: dict[str, float]
    left_out: int


class Turns(Generic[T]):
    """Runs to be timed in turn.

    Args:
        runs: by name; each returns what it measured.
        product: returns the milliseconds of one turn of a product.
    """

    def __init__(self, runs: Mapping[str, Callable[[], T]], product: Callable[[], float]) -> None:
        self._runs, self._product = runs, product
        self._turns: dict[str, list[Turn[T]]] = {name: [] for name in runs}
        self._least_ms = math.inf
        self._patience_s = 0.0

    def take(self, rounds: int) -> Timings[T]:
        """Run each until so many of its turns count, or until `MOST_ROUNDS` times as many were made: then all of them count.

        By `product_ms` it is then seen (`is_steady`) whether the machine changed its rate, or one fast turn was the exception.

        Every second round is backwards (A B B A), so that a clock that falls disturbs all of them. Between runs it is waited
        for the machine's rate, no longer in all than the runs took.
        """
        for turn in range(MOST_ROUNDS * rounds):
            before = self._wait()
            for name in list(self._runs)[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                found = self._runs[name]()
                self._patience_s += time.perf_counter() - start
                after = self._time()
                self._turns[name].append(Turn(found, max(before, after)))
                before = after if self._keeps_rate(after) else self._wait()
            counting = self._counting()
            if min(map(len, counting.values())) >= rounds:
                return self._timings(counting)
        return self._timings(self._turns)

    def _counting(self) -> dict[str, list[Turn[T]]]:
        return {name: [turn for turn in turns if self._keeps_rate(turn.product_ms)] for name, turns in self._turns.items()}

    def _timings(self, counting: Mapping[str, Sequence[Turn[T]]]) -> Timings[T]:
        beside = [turn.product_ms for turns in counting.values() for turn in turns]
        found = {name: [turn.found for turn in turns] for name, turns in counting.items()}
        return Timings(found, summarise(beside), sum(map(len, self._turns.values())) - len(beside))

    def _keeps_rate(self, product_ms: float) -> bool:
        return product_ms <= MOST_SPREAD * self._least_ms

    def _time(self) -> float:
        found = self._product()
        self._least_ms = min(self._least_ms, found)
        return found

    def _wait(self) -> float:
        """A turn of the product, as soon as the machine has its rate or patience has an end."""
        while not self._keeps_rate(found := self._time()) and self._patience_s > 0:
            time.sleep(_WAIT_S)
            self._patience_s -= _WAIT_S
        return found


def spread(timing: dict[str, float]) -> float:
    """p80 over p20."""
    return timing["p80_ms"] / timing["p20_ms"]


def is_steady(record: Record) -> bool:
    """Whether the machine kept its rate while a record was taken; true of records from before this was looked at."""
    return "product_ms" not in record or spread(record["product_ms"]) <= MOST_SPREAD
