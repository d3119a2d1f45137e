"""The processes that compute one step together, and what they send each other.

Two channels over one store: objects go through gloo, which waits as long as an engine is idle; tensors of a step through NCCL
on GPUs and gloo on CPUs, with a time limit, since within a step nobody waits for long. No process group of `torch.distributed`
is made: a service that the engine is embedded in may have its own.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented there, not declared

from uso_engine.errors import ParallelError

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")
WITHOUT_END = timedelta(days=400)
CONNECTING = timedelta(minutes=1)
"""How long processes that are ready may take to find each other."""
_LOOKS_EVERY_S = 1.0
_HOST = "127.0.0.1"
FAULTS = (RuntimeError, ConnectionError)
"""What collectives raise: gloo a RuntimeError, NCCL and the store a `DistError`, which is one."""


class _Work(Protocol):
    def wait(self, timeout: timedelta = ..., /) -> object: ...


class _Channel(Protocol):
    """What of a `torch.distributed.ProcessGroup` is used; the backends do not declare that they are one."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions, /) -> _Work: ...
    def alltoall_base(self, received: Tensor, sent: Tensor, to: list[int], by: list[int], /) -> _Work: ...
    def shutdown(self) -> None: ...
    def abort(self) -> None: ...


def serve_store(size: int) -> TCPStore:
    """The store of a group of so many processes of this machine, on a free port; only the first process serves it."""
    return TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False, timeout=CONNECTING)


def connect_store(port: int, size: int) -> TCPStore:
    """The store that the first process serves on a port.

    Raises:
        ParallelError: it does not, for a minute.
    """

    def connect() -> TCPStore:
        store = TCPStore(_HOST, port, size, is_master=False, wait_for_workers=False, timeout=CONNECTING / 2)
        store.set_timeout(CONNECTING)
        return store

    try:
        return within(CONNECTING, connect)
    except (*FAULTS, TimeoutError) as error:
        raise ParallelError(f"no process of this machine serves a group on port {port}: {error}") from error


def _got(outcome: SimpleQueue[Kind], limit: timedelta) -> Kind:
    """What a queue gives in time.

    Python notices an interrupt that comes just before it begins to wait only when that wait is over: so none is long.

    Raises:
        Empty: nothing came.
    """
    end_s = time.monotonic() + limit.total_seconds()
    while (left_s := end_s - time.monotonic()) > _LOOKS_EVERY_S:
        with suppress(Empty):
            return outcome.get(timeout=_LOOKS_EVERY_S)
    return outcome.get(timeout=max(0.0, left_s))


def within(limit: timedelta, connect: Callable[[], Kind]) -> Kind:
    """What a call returns that connects to a store, which must not take longer than is said.

    PyTorch takes a store's limit once for every kind of address, and then names it as if that had been all: told half of it, it
    gives up at about the same time.

    Args:
        limit: how long; the call goes on in a thread of its own until PyTorch gives it up. Nothing can interrupt it, and the
            process's end waits for that: an interpreter that ends beneath a call into PyTorch aborts. A warning says so, also
            where whoever waits is interrupted.
        connect: the call.

    Raises:
        TimeoutError: it takes longer.
        Exception: whatever it raises before.
    """
    outcome: SimpleQueue[tuple[Kind, None] | tuple[None, Exception]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((connect(), None))
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            outcome.put((None, error))

    thread = threading.Thread(target=run, name="connecting", daemon=False)
    try:
        thread.start()
        value, error = _got(outcome, limit)
    except BaseException as error:
        if thread.is_alive():
            logger.warning(
                "PyTorch is still connecting, which nothing can interrupt: this process ends when it has given up, about %s "
                "after it began (SIGKILL ends it at once)",
                limit,
            )
        if isinstance(error, Empty):
            raise TimeoutError(f"no answer within {limit}") from None
        raise
    if error is not None:
        raise error
    return cast("Kind", value)


class Group:
    """So many processes, this one among them.

    Args:
        store: that all of them reach.
        rank: of this process, from 0.
        size: processes.
        device: where this process computes.
        step_timeout_s: how long it waits for the others within a step.
        joining: how long it waits for the others to join.

    Raises:
        ParallelError: the others did not come.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        step_timeout_s: float,
        joining: timedelta = CONNECTING,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.step_limit = limit = timedelta(seconds=step_timeout_s)
        try:
            self._control = cast("_Channel", dist.ProcessGroupGloo(PrefixStore("control", store), rank, size, joining))
            data = PrefixStore("data", store)
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                self._data = cast("_Channel", dist.ProcessGroupNCCL(data, rank, size, options))
            else:
                self._data = cast("_Channel", dist.ProcessGroupGloo(data, rank, size, limit))
        except FAULTS as error:
            raise ParallelError(f"process {rank} of {size} could not join the others: {error}") from error

    def share_object(self, value: Kind | None, limit: timedelta = WITHOUT_END) -> Kind:
        """Give every process what the first one has; the others wait for it, however long.

        Args:
            value: of the first process.
            limit: how long the first one waits for the others to take it.

        Raises:
            ParallelError: a process is gone, or takes longer.
        """
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if self.rank == 0 else None
        length = torch.tensor([0 if data is None else len(data)])
        self._broadcast(self._control, length, limit)
        content = torch.empty(int(length), dtype=torch.uint8) if data is None else data
        self._broadcast(self._control, content, limit)
        if self.rank == 0:
            return cast("Kind", value)
        # From the engine's own first process: it has started this one, or one user has started both by torchrun.
        shared: Kind = pickle.loads(content.numpy().tobytes())  # noqa: S301
        return shared

    def share(self, tensor: Tensor) -> Tensor:
        """Give every process the first one's tensor, in the others' own of that shape."""
        self._broadcast(self._data, tensor)
        return tensor

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """As `begin_all_to_all`, and wait for it."""
        return self.begin_all_to_all(x, sent, received).wait()

    def begin_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Arriving:
        """Begin to send rows to every process and to receive theirs, beside what is computed until they are waited for.

        Args:
            x: [rows, ...], first those for the first process.
            sent: rows for each process.
            received: rows from each.

        Returns:
            [sum of received, ...], on its way, first those of the first process.

        Raises:
            ParallelError: a process is gone.
        """
        x = x.contiguous()
        result = x.new_empty(sum(received), *x.shape[1:])
        try:
            # As bytes: not every backend moves every dtype.
            work = self._data.alltoall_base(_as_bytes(result), _as_bytes(x), list(received), list(sent))
        except FAULTS as error:
            raise self.gone(error) from error
        return Arriving(self, work, x, result)

    def close(self) -> None:
        """Leave the others."""
        for channel in (self._data, self._control):
            channel.shutdown()

    def abort(self) -> None:
        """Give up what is under way, so that no thread waits for processes that are gone."""
        for channel in (self._data, self._control):
            channel.abort()

    def _broadcast(self, channel: _Channel, tensor: Tensor, limit: timedelta | None = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        if channel is self._control:
            # Its own limit is that for joining; an engine may be idle for longer.
            options.timeout = WITHOUT_END
        try:
            work = channel.broadcast([tensor], options)
            work.wait() if limit is None else work.wait(limit)
        except FAULTS as error:
            raise self.gone(error) from error

    def gone(self, error: Exception) -> ParallelError:
        """What is said where a collective fails."""
        return ParallelError(
            f"process {self.rank} of {self.size} lost the others: one has ended, or did not answer in time ({error})"
        )


@dataclass(frozen=True)
class Arriving:
    """Rows that other processes are sending.

    Args:
        group: the processes.
        work: their exchange.
        sent: what this one sends, kept until it has been read.
        received: where the rows arrive.
    """

    group: Group
    work: _Work
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """The rows, when they are there; on a GPU what is launched after this waits for them, and not the host.

        Raises:
            ParallelError: a process is gone, or takes longer than a step may.
        """
        try:
            self.work.wait()
        except FAULTS as error:
            raise self.group.gone(error) from error
        return self.received


def _as_bytes(x: Tensor) -> Tensor:
    """[rows, bytes of a row], in the same memory."""
    return x.flatten(1).view(torch.uint8)
