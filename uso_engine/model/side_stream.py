"""A second stream of a GPU, for work that needs nothing of what the first computes meanwhile.

    first     ... fork, first function          join ...
    second              waits, second function

PyTorch's allocator gives a tensor's memory back to the stream on which it was made, at the moment when Python lets go of it,
whatever other streams have yet to do with it. So these rules hold, and `tests/test_side_stream.py` finds what breaks them:

1. The second stream waits at the fork for all that the first was given before. What it reads is then written, and what the
   first stream was handed out before is free of whoever had that memory earlier.
2. What it reads and writes of the first stream's memory is kept until the join, since another thread may be handed it at any
   time: the function that joins holds its arguments. `Tensor.record_stream` would do so, too, but memory that was recorded
   comes back only when the device has passed an event, and during the capture of a CUDA graph not at all.
3. Memory of the second stream is handed out between a fork and its join alone. So when it is handed out again, whatever the
   first stream has read of it, it has read before that fork, no matter who kept it for how long. Between the two the first
   stream reads none of it.
   That holds of one thread. Where two evaluate, one lets go of such memory after the other's fork, which waits for nothing that
   was read of it since, and is then handed it: so the stream is of one evaluation at a time (`used`). PyTorch has 32 streams of
   a priority for a device and gives them out in turn, so that two transformers may be given the same: one that no other
   transformer has is looked for, and where there is none, they take turns. And that holds of one first stream: where the
   evaluation before had another, the second stream waits for that one, too. Who else in the process was given the stream, and
   lets it hand out memory, cannot be known.
4. The first stream waits at the join, where work failed too. Outside of pairs there is therefore one order, and observers,
   hooks of blocks, layers that come from the host, exchanges between processes and graphs need to know nothing of this.

Nothing is computed otherwise. cuBLAS promises the same bits where each stream has a workspace of its own, which PyTorch gives
it (32 MiB on Hopper); `benchmarks/gpu/variants.py` demands them. The second stream has the higher priority: where both have
tiles to compute, its few go first, and the first stream's many fill what is left. The host queues the first stream's work
first, as it does without a second: it is ahead of a GPU that has enough to do for any of this to matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import nn

from uso_engine.errors import BackendError
from uso_kernels.launch import numbered

from .hooks import is_hooked

First = TypeVar("First", bound=Callable[..., object])
Second = TypeVar("Second", bound=Callable[..., object])


class Stream(Protocol):
    """What is used of a `torch.cuda.Stream`."""

    def record_event(self) -> object:
        """An event after all that the stream was given so far."""

    def wait_event(self, event: Any) -> None:
        """Let what the stream is given from now on wait for an event."""

    def wait_stream(self, stream: Any) -> None:
        """Let what the stream is given from now on wait for all that another was given so far."""


class Streams(Protocol):
    """The streams of a device; `CudaStreams` are the real ones."""

    def make(self) -> Stream:
        """A new stream."""

    def current(self) -> Stream:
        """The stream that work is given to now."""

    def entered(self, stream: Any) -> AbstractContextManager[object]:
        """Within it, work is given to that stream."""

    def is_capturing(self) -> bool:
        """Whether work is recorded for a CUDA graph now, which has memory of its own."""


class CudaStreams:
    """Streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self) -> Stream:
        """A stream of the higher priority."""
        return cast("Stream", torch.cuda.Stream(self._device, priority=-1))

    def current(self) -> Stream:
        """The stream that PyTorch, Triton and the libraries use in this thread."""
        return cast("Stream", torch.cuda.current_stream(self._device))

    def entered(self, stream: Stream) -> AbstractContextManager[object]:
        """Within it, they use that stream."""
        return cast("AbstractContextManager[object]", torch.cuda.stream(cast("torch.cuda.Stream", stream)))

    def is_capturing(self) -> bool:
        """Whether this thread's stream is being captured."""
        return torch.cuda.is_current_stream_capturing()


class _Turns:
    """Whose a stream is at the moment, for the transformers that have it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holder: SideStream | None = None
        self.last_first: Stream | None = None
        """The first stream of the evaluation before."""


POOL_STREAMS = 32
"""Streams of a priority that PyTorch has for a device."""
_TURNS: WeakValueDictionary[Stream, _Turns] = WeakValueDictionary()
"""Of each second stream that a transformer has; two objects for one stream of a device are equal."""
_TAKING = threading.Lock()


def _taken(streams: Streams) -> tuple[Stream, _Turns]:
    """A stream, one that no transformer has where there is such a one, and its turns."""
    with _TAKING:
        for _ in range(POOL_STREAMS):
            stream = streams.make()
            if stream not in _TURNS:
                break
        turns = _TURNS.get(stream)
        if turns is None:
            turns = _TURNS[stream] = _Turns()
        return stream, turns


def why_no_side_stream(device: torch.device) -> str | None:
    """Why a device has no second stream, or None."""
    if device.type != "cuda":
        return f"a {device.type.upper()} has no streams"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


class SideStream:
    """A second stream, of one transformer: libraries keep a workspace for each stream, and one that is kept needs one.

    Args:
        device: whose.
        streams: the device's; the real ones by default.

    Raises:
        BackendError: it has none.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        if streams is None:
            reason = why_no_side_stream(device)
            if reason is not None:
                raise BackendError(f"no work beside other work here: {reason}")
            streams = CudaStreams(numbered(device))
        self.device, self._streams = numbered(device), streams
        self._stream, self._turns = _taken(streams)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Around an evaluation, from its first pair to the last thing that reads what the second stream made.

        It waits while another transformer that has been given the same stream is evaluated.

        Raises:
            ValueError: another thread is within it.
        """
        turns = self._turns
        if not turns.lock.acquire(blocking=False):
            if turns.holder is self:
                raise ValueError(
                    "one thread at a time evaluates a transformer with a second stream, and another does (Transformer.beside)"
                )
            turns.lock.acquire()
        before, turns.holder = turns.holder, self
        try:
            if not self._streams.is_capturing():
                first = self._streams.current()
                if turns.last_first is not None and turns.last_first != first:
                    self._stream.wait_stream(turns.last_first)
                turns.last_first = first
            yield
        finally:
            turns.holder = before
            turns.lock.release()

    def pair(self, first: First, second: Second, layers: Sequence[nn.Module], device: torch.device) -> tuple[First, Second]:
        """Two functions that need nothing of each other, made so that the second is computed beside the first.

        Args:
            first: begins what is called `first` first, with nothing of the two called between.
            second: what it writes of the first stream's memory, it is given as an argument.
            layers: what both compute with.
            device: where their operands are.

        Returns:
            Functions to call in their places. The first one forks and the second one joins.

        Raises:
            ValueError: autograd or a compiler is at work, whose backward pass knows nothing of these rules; a layer has hooks,
                which may bring together what the two compute; the operands are elsewhere.
        """
        reason = self._why_not(layers, device)
        if reason is not None:
            raise ValueError(f"nothing can be computed beside other work here: {reason} (Transformer.beside)")
        streams, side = self._streams, self._stream
        fork: object = None

        def compute_first(*arguments: Any) -> object:
            nonlocal fork
            fork = streams.current().record_event()
            return first(*arguments)

        def compute_second(*arguments: Any) -> object:
            nonlocal fork
            assert fork is not None, "the first function comes first"
            current = streams.current()
            side.wait_event(fork)
            fork = None
            try:
                with streams.entered(side):
                    return second(*arguments)
            finally:
                current.wait_stream(side)

        return cast("First", compute_first), cast("Second", compute_second)

    def _why_not(self, layers: Sequence[nn.Module], device: torch.device) -> str | None:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "autograd or a compiler records what is computed; call the transformer under torch.no_grad()"
        if any(is_hooked(module) for layer in layers for module in layer.modules()):
            return "a layer has a hook, which may bring together what the two streams compute"
        if device != self.device:
            return f"the stream is of {self.device}, the operands are on {device}"
        return None
