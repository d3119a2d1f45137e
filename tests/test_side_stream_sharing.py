"""A second stream that two transformers have been given, as PyTorch gives its 32 out in turn, and first streams that change."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from simulated_streams import FIRST, SECOND, RaceFinder, SimulatedStream, SimulatedStreams
from test_side_stream import CPU, IN_ORDER, fresh, made
from test_side_stream_threads import incremented
from torch import Tensor

from uso_engine.model import side_stream
from uso_engine.model.side_stream import SideStream


class Pool(SimulatedStreams):
    """A device that gives out so many second streams in turn."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._pool, self._given = [SimulatedStream(SECOND) for _ in range(size)], 0

    def make(self) -> SimulatedStream:
        self._given += 1
        return self._pool[(self._given - 1) % len(self._pool)]


def test_a_stream_that_no_other_transformer_has_is_looked_for() -> None:
    """An engine that was loaded anew as often as there are streams does not get another engine's."""
    streams = Pool(3)
    kept = SideStream(CPU, streams)
    for _ in range(7):
        again = SideStream(CPU, streams)
        assert again._stream is not kept._stream
    others = [SideStream(CPU, streams)]
    assert len({id(side._stream) for side in (kept, again, *others)}) == 3
    # None is left: one is shared, with its turns.
    others.append(SideStream(CPU, streams))
    assert others[-1]._turns in [side._turns for side in (kept, again, others[0])]
    taken = len(side_stream._TURNS)
    del kept, again, others
    assert len(side_stream._TURNS) == taken - 3


@torch.no_grad()
def test_two_that_share_a_stream_take_turns_and_use_no_memory_in_no_order() -> None:
    """Without turns it is the fault of `test_pairs_of_two_evaluations_would_take_each_others_memory`."""
    streams = Pool(1)
    one, other = SideStream(CPU, streams), SideStream(CPU, streams)
    assert one._stream is other._stream
    order, begins = list[str](), threading.Event()
    finder = RaceFinder(streams)

    def evaluate(side: SideStream, name: str) -> None:
        with torch.no_grad(), side.used(), finder:
            order.append(f"{name} begins")
            first, beside = side.pair(fresh, incremented, (), CPU)
            x = torch.ones(4)
            first()
            text = beside(x)
            if name == "one":
                begins.set()
                assert not waiting.wait(0.2), "the other has begun"
            assert torch.equal(text + 1, torch.full((4,), 3.0))
            del text
            order.append(f"{name} ends")

    def evaluate_other() -> None:
        assert begins.wait(20)
        evaluate(other, "other")
        waiting.set()

    waiting = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(evaluate_other)
        evaluate(one, "one")
        second.result(20)
    assert order == ["one begins", "one ends", "other begins", "other ends"]
    assert finder.faults == []


@torch.no_grad()
def test_whole_transformers_that_share_a_stream_have_their_bits() -> None:
    streams = Pool(1)
    transformers = [made(IN_ORDER) for _ in range(2)]
    expected = [transformer(*given) for transformer, *given in transformers]
    for transformer, *_ in transformers:
        transformer.beside = SideStream(CPU, streams)

    def evaluate(index: int) -> list[Tensor]:
        transformer, *given = transformers[index]
        with torch.no_grad():
            return [transformer(*given) for _ in range(4)]

    with ThreadPoolExecutor(2) as threads:
        for index, found in enumerate(threads.map(evaluate, range(2))):
            assert all(torch.equal(velocity, expected[index]) for velocity in found)


@pytest.mark.parametrize("capturing", [False, True])
@torch.no_grad()
def test_another_first_stream_is_waited_for(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still read what the second stream made; but for a graph, whose memory is its own."""
    streams, third = Pool(1), SimulatedStream("third")
    side = SideStream(CPU, streams)
    with side.used():
        pass
    streams.first.clock[FIRST] = 7
    with side.used():
        assert side._stream.record_event() == {}
    monkeypatch.setattr(streams, "is_capturing", lambda: capturing)
    with streams.entered(third), side.used():
        third.clock["third"] = 3
        assert side._stream.record_event() == ({} if capturing else {FIRST: 7})
    monkeypatch.undo()
    with side.used():
        assert side._stream.record_event() == ({} if capturing else {FIRST: 7, "third": 3})
