"""A second stream is of one evaluation at a time: what two threads' would do to each other, and how they are kept apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from simulated_streams import RaceFinder, SimulatedStreams
from test_side_stream import CPU, IN_ORDER, fresh, made
from torch import Tensor

from uso_engine.model.side_stream import SideStream


def incremented(x: Tensor) -> Tensor:
    return x + 1


@torch.no_grad()
def test_pairs_of_two_evaluations_would_take_each_others_memory() -> None:
    """One forks; the other reads what the second stream made, and lets go of it; the one is handed it by the second stream."""
    streams = SimulatedStreams()
    side = SideStream(CPU, streams)
    first, beside = side.pair(fresh, incremented, (), CPU)
    other_first, other_beside = side.pair(fresh, incremented, (), CPU)
    with RaceFinder(streams) as finder:
        x = torch.ones(4)
        first()
        text = beside(x)
        other_first()
        text + 1
        del text
        other_beside(x)
    assert finder.faults == ["second: hands out memory that first still uses"]


@torch.no_grad()
def test_one_thread_at_a_time_evaluates() -> None:
    """In turn they may, and one may evaluate within its own evaluation."""
    transformer, batch, latents, modulation = made(IN_ORDER)
    transformer.beside = SideStream(CPU, SimulatedStreams())

    def evaluate(*observer: Any) -> Tensor:
        with torch.no_grad():
            return transformer(transformer.run_of(batch), latents, modulation, *observer)

    with ThreadPoolExecutor(1) as other:
        expected = other.submit(evaluate).result()
        faults: list[BaseException | None] = []
        found = evaluate(lambda *seen: faults.append(other.submit(evaluate).exception()))
        assert faults and all(isinstance(fault, ValueError) and "one thread at a time" in str(fault) for fault in faults)
        assert torch.equal(found, expected)
        assert torch.equal(evaluate(lambda *seen: evaluate()), expected)
        assert torch.equal(other.submit(evaluate).result(), expected)
