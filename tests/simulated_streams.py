"""Two streams and an allocator of a device, simulated on a CPU: finds what is read, written or handed out without order.

Operations are computed at once, in the order in which they are queued. What a GPU could do instead is looked for in what they
touch: each byte of each storage remembers when each stream last read and wrote it, in counts of that stream's operations, and
each stream knows how far it has waited for the other (a vector clock). As PyTorch's allocator does, a storage that Python lets
go of goes back to the stream it was made on, which may hand it out for the next tensor.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Ticks = np.ndarray[Any, np.dtype[np.int32]]
Clock = Counter[str]
FIRST, SECOND = "first", "second"
NAMES = (FIRST, SECOND)
UNTOUCHED = {"new_empty", "empty", "empty_like", "new_empty_strided", "empty_strided", "detach"}
"""Operations that read nothing of what they are given."""


class SimulatedStream:
    """A queue of operations.

    Args:
        name: what faults call it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = Counter()
        """How many operations of each stream are done before what is queued next."""

    def record_event(self) -> Clock:
        return self.clock.copy()

    def wait_event(self, event: Clock) -> None:
        self.clock |= event

    def wait_stream(self, stream: SimulatedStream) -> None:
        self.wait_event(stream.record_event())


class SimulatedStreams:
    """A device with two streams."""

    def __init__(self) -> None:
        self.first = SimulatedStream(FIRST)
        self.made: list[SimulatedStream] = []
        self._current = [self.first]

    def make(self) -> SimulatedStream:
        assert not self.made, "one transformer needs one second stream"
        self.made.append(SimulatedStream(SECOND))
        return self.made[-1]

    def current(self) -> SimulatedStream:
        return self._current[-1]

    def is_capturing(self) -> bool:
        return False

    @contextmanager
    def entered(self, stream: SimulatedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class NoFork(SimulatedStreams):
    """The second stream does not wait for the first."""

    def make(self) -> SimulatedStream:
        made = super().make()
        made.wait_event = lambda event: None  # type: ignore[method-assign]
        return made


class StaleFork(SimulatedStreams):
    """It waits for where the first was in the beginning, so memory handed out since may still be somebody's."""

    def __init__(self) -> None:
        super().__init__()
        event = self.first.record_event()
        self.first.record_event = lambda: event  # type: ignore[method-assign]


class NoJoin(SimulatedStreams):
    """The first stream does not wait for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first.wait_stream = lambda stream: None  # type: ignore[method-assign]


class LateJoin(SimulatedStreams):
    """The first stream waits for the last pair's work only when the next is forked: arguments are let go of before."""

    def __init__(self) -> None:
        super().__init__()
        record, wait, late = self.first.record_event, self.first.wait_stream, list[SimulatedStream]()

        def record_event() -> Clock:
            while late:
                wait(late.pop())
            return record()

        def wait_stream(stream: SimulatedStream) -> None:
            late.append(stream)

        self.first.wait_stream = wait_stream  # type: ignore[method-assign]
        self.first.record_event = record_event  # type: ignore[method-assign]


class Memory:
    """A storage: who made it, and when each byte was last read and written by each stream."""

    def __init__(self, size_bytes: int, owner: SimulatedStream | None) -> None:
        self.owner, self.size_bytes = owner, size_bytes
        self.read = {name: np.zeros(size_bytes, np.int32) for name in NAMES}
        self.written = {name: np.zeros(size_bytes, np.int32) for name in NAMES}
        if owner is not None:
            # Whoever had this memory before may use it up to where its stream is now.
            self.written[owner.name][:] = owner.clock[owner.name]


class RaceFinder(TorchDispatchMode):
    """Watches every operation within it. `faults` say what two streams do in no order; `counts`, how many operations each did;
    `peak`, how many bytes of its memory were alive at once.

    Args:
        streams: the device's.
    """

    def __init__(self, streams: SimulatedStreams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams
        self._memory: dict[int, Memory] = {}
        self._given_back: dict[str, list[Memory]] = {name: [] for name in NAMES}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._alive: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        stream = self._streams.current()
        stream.clock[stream.name] += 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        name = function._schema.name.partition("::")[2].partition(".")[0]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and name not in UNTOUCHED:
            self.counts[stream.name] += 1
            self._look(name, function._schema.arguments, args, kwargs, stream)
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._hand_out(tensor, stream)
                if name not in UNTOUCHED:
                    self._access(name, tensor, stream, writes=True)
        return result

    def _look(self, name: str, declared: Any, args: Any, kwargs: Any, stream: SimulatedStream) -> None:
        """Note what an operation reads and writes of what it is given."""
        values = {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs
        for argument in declared:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            # Where the streams' rows are mixed in joint order, each writes the rows of its index.
            rows = values.get("rows") if name == "qk_norm_rope_into" and writes else None
            for tensor in tree_leaves(values.get(argument.name)):
                if isinstance(tensor, Tensor):
                    self._access(name, tensor, stream, writes=writes, rows=rows)

    def _access(self, name: str, tensor: Tensor, stream: SimulatedStream, *, writes: bool, rows: Tensor | None = None) -> None:
        memory, now = self._memory_of(tensor), stream.clock[stream.name]
        for other in NAMES:
            if other == stream.name:
                continue
            seen = stream.clock[other]
            if _last(memory.written[other], tensor, rows) > seen:
                self.faults.append(f"{stream.name}: {name} before {other} has written")
            elif writes and _last(memory.read[other], tensor, rows) > seen:
                self.faults.append(f"{stream.name}: {name} overwrites what {other} reads")
        ticks = _bytes_of((memory.written if writes else memory.read)[stream.name], tensor)
        ticks[slice(None) if rows is None else rows.numpy()] = now

    def _hand_out(self, tensor: Tensor, stream: SimulatedStream) -> None:
        """A tensor gets memory: of what was given back to its stream, any may be it."""
        for memory in self._given_back[stream.name]:
            for other, ticks in chain(memory.read.items(), memory.written.items()):
                if other != stream.name and ticks.size and ticks.max() > stream.clock[other]:
                    self.faults.append(f"{stream.name}: hands out memory that {other} still uses")
        # What is not in order yet is told once.
        self._given_back[stream.name].clear()
        self._alive[stream.name] += self._memory_of(tensor, stream).size_bytes
        self.peak |= self._alive

    def _memory_of(self, tensor: Tensor, owner: SimulatedStream | None = None) -> Memory:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = Memory(storage.nbytes(), owner)
            weakref.finalize(storage, self._give_back, storage._cdata)
        return self._memory[storage._cdata]

    def _give_back(self, storage: int) -> None:
        memory = self._memory.pop(storage)
        if memory.owner is not None:
            self._given_back[memory.owner.name].append(memory)
            self._alive[memory.owner.name] -= memory.size_bytes


def _bytes_of(ticks: Ticks, tensor: Tensor) -> Ticks:
    """The ticks of a tensor's bytes, [*shape, bytes of an element], to read or to write."""
    size = tensor.element_size()
    strides = (*(step * size * ticks.itemsize for step in tensor.stride()), ticks.itemsize)
    start = ticks[tensor.storage_offset() * size :]
    return np.lib.stride_tricks.as_strided(start, (*tensor.shape, size), strides)


def _last(ticks: Ticks, tensor: Tensor, rows: Tensor | None) -> int:
    found = _bytes_of(ticks, tensor)
    found = found if rows is None else found[rows.numpy()]
    return int(found.max()) if found.size else 0
