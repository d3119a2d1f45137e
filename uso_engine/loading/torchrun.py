"""The processes of one engine where torchrun has started them: the first makes the engine, the others follow it to its end.

torchrun gives each process its number and a store that all reach, on one machine or on several. Both are asked for through
`torch.distributed`'s own rendezvous; its default group is not touched. torchrun starts and ends the processes, so what is
said here goes through the store: that one has loaded, has failed and why, or is done.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # documented there, not declared
from torch.distributed.rendezvous import rendezvous

from uso_engine import call_arguments
from uso_engine.config import EngineConfig, load_config
from uso_engine.errors import BackendError, ParallelError
from uso_engine.parallel.follower import follow
from uso_engine.parallel.group import CONNECTING, FAULTS, Group, within
from uso_engine.parallel.leader import Leader
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.process_state import clean_process_state

from .device import check_device, default_device
from .transformer import load_transformer

_LOADING = timedelta(minutes=30)
_ENDING_S = 5.0
_POLL_S = 0.05
_FIRST_CAME, _FIRST_LEFT = "first came", "first left"


@dataclass(frozen=True)
class Launch:
    """What torchrun says of this process.

    Args:
        store: that all of its processes share.
        rank: of this one, over all machines.
        size: processes.
    """

    store: Store
    rank: int
    size: int

    def say(self, key: str, text: str = "") -> None:
        """Leave word for the others. Where torchrun has ended, and its store with it, nobody is left who would read it."""
        with suppress(*FAULTS):
            self.store.set(key, text)

    def heard(self, key: str) -> bool:
        """Whether there is such word.

        Raises:
            ParallelError: torchrun has ended, and its store with it.
        """
        try:
            return bool(self.store.check([key]))
        except FAULTS as error:
            raise ParallelError(f"process {self.rank} of {self.size} lost torchrun's store: {error}") from error

    def check_size(self, ulysses: int) -> None:
        """Check that torchrun has started as many processes as are to compute together.

        Raises:
            ParallelError: it has not.
        """
        if self.size != ulysses:
            raise ParallelError(
                f"torchrun started {self.size} processes and [parallel] ulysses is {ulysses}: "
                f"give both the same number (this is process {self.rank})"
            )


@cache  # The store is a connection, and the first process may be the one that serves it.
def torchrun_launch() -> Launch | None:
    """What torchrun says of this process; None where it has not started it.

    Raises:
        ParallelError: its store does not answer within a minute.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return None
    try:
        store, rank, size = within(CONNECTING, lambda: next(rendezvous("env://", timeout=CONNECTING / 2)))
        store.set_timeout(CONNECTING)
    except (*FAULTS, ValueError, TimeoutError) as error:
        raise ParallelError(f"torchrun started this process, but its store cannot be joined: {error}") from error
    return Launch(PrefixStore("uso-engine", store), rank, size)


@clean_process_state()
def follow_if_not_first(
    config: str | Path | EngineConfig,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> bool:
    """Under torchrun: in every process but the first, compute with the first one until its engine is closed.

    A program calls it with what it gives `USOEngine.from_config`, and makes its engine where the answer is False. In the main
    thread SIGINT and SIGTERM wait meanwhile for what becomes of the first process, which torchrun sends them, too.

    Args:
        config: as for `USOEngine.from_config`; `parallel.ulysses` is the number of torchrun's processes.
        device: "cpu" or "cuda"; by default a GPU where there is one: the one whose number on its machine is the process's.
        dtype: as for `USOEngine.from_config`.
        attention: as for `USOEngine.from_config`.

    Returns:
        False in the first process, and where torchrun has not started this one; True where this process has followed.

    Raises:
        ParallelError: torchrun has started another number of processes, in each of them; the first one made no engine within
            half an hour; weights or versions differ; or a process is gone.
        BackendError: a GPU is named by its number, or there is none for this process.
        MissingFileError, ConfigError, CheckpointError, ValueError: as for `USOEngine.from_config`.
    """
    call_arguments.check_loading(config, device, dtype, attention, None, None)
    launch = torchrun_launch()
    if launch is None:
        return False
    if not isinstance(config, EngineConfig):
        config = load_config(config)
    launch.check_size(config.parallel.ulysses)
    if launch.rank == 0:
        return False
    try:
        _follow(launch, config, _device_of_its_own(device), dtype, attention)
    except BaseException as error:
        launch.say(_failed(launch.rank), str(error) or type(error).__name__)
        raise
    launch.say(_done(launch.rank))
    return True


def _follow(launch: Launch, config: EngineConfig, device: torch.device, dtype: torch.dtype | None, attention: str) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tier = config.precision.tier if dtype is None else TIER_OF_DTYPE[dtype]
    loaded = load_transformer(config, device=device, tier=tier, attention=attention)
    try:
        launch.say(_joining(launch.rank))
        _wait_for_the_first(launch)
        with _signals_are_the_firsts():
            follow(Group(launch.store, launch.rank, launch.size, device, config.parallel.step_timeout_s), loaded)
    finally:
        loaded.close()


def _wait_for_the_first(launch: Launch) -> None:
    deadline = time.monotonic() + _LOADING.total_seconds()
    while not launch.heard(_FIRST_CAME):
        if launch.heard(_FIRST_LEFT):
            raise ParallelError(f"process {launch.rank} of {launch.size}: the first process could not load its engine")
        if time.monotonic() > deadline:
            raise ParallelError(f"process {launch.rank} of {launch.size}: the first process made no engine within {_LOADING}")
        time.sleep(_POLL_S)


class TorchrunProcesses:
    """Every process but the first, started by torchrun.

    Args:
        launch: this process's.
        config: of the engine.
        device: of this process.

    Raises:
        ParallelError: there are more or fewer than `parallel.ulysses`, this is not the first, or they have had their engine.
        BackendError: the device is not this process's own.
    """

    def __init__(self, launch: Launch, config: EngineConfig, device: torch.device) -> None:
        self._launch, self._device, self._config = launch, device, config
        self._others = range(1, launch.size)
        launch.check_size(config.parallel.ulysses)
        if launch.rank != 0:
            raise ParallelError(
                f"process {launch.rank} of torchrun's {launch.size} makes no engine: call follow_if_not_first(config) before "
                "from_config, and from_config only where it returns False"
            )
        if launch.heard(_FIRST_CAME) or launch.heard(_FIRST_LEFT):
            raise ParallelError("torchrun's processes follow one engine, and there was one before: start the program again")
        _device_of_its_own(device)

    def join(self) -> Leader:
        """Wait until all have loaded, and become the first of the group.

        Raises:
            ParallelError: one could not load, or takes longer than half an hour.
        """
        deadline = time.monotonic() + _LOADING.total_seconds()
        while not all(self._launch.heard(_joining(rank)) for rank in self._others):
            if failed := self._failures():
                raise ParallelError(f"a process failed before it could join: {failed}")
            if time.monotonic() > deadline:
                raise ParallelError(f"a process has not loaded the transformer within {_LOADING}")
            time.sleep(_POLL_S)
        self._launch.say(_FIRST_CAME)
        group = Group(self._launch.store, 0, self._launch.size, self._device, self._config.parallel.step_timeout_s)
        return Leader(group, self.end)

    def end(self) -> str:
        """Let them end, wait a moment for those that do, and say why the others did. A second call does nothing more."""
        self._launch.say(_FIRST_LEFT)
        deadline = time.monotonic() + _ENDING_S
        try:
            while time.monotonic() < deadline and not all(map(self._has_ended, self._others)):
                time.sleep(_POLL_S)
            return self._failures()
        except ParallelError as error:
            return str(error)

    def _has_ended(self, rank: int) -> bool:
        return self._launch.heard(_done(rank)) or self._launch.heard(_failed(rank))

    def _failures(self) -> str:
        failed = [_failed(rank) for rank in self._others if self._launch.heard(_failed(rank))]
        return "; ".join(f"{key.replace('failed/', 'process ')}: {self._launch.store.get(key).decode()}" for key in failed)


def _device_of_its_own(device: str | torch.device | None) -> torch.device:
    """Where this process computes: the GPU whose number on its machine is the process's there, or the CPU.

    Raises:
        ParallelError: nobody says that number.
        BackendError: there is no such GPU, or another one is named.
    """
    found = default_device() if device is None else check_device(device)
    if found.type != "cuda":
        return found
    try:
        own = dist.get_node_local_rank()
    except (RuntimeError, ValueError) as error:
        raise ParallelError(f"torchrun started this process, but does not say its number on this machine: {error}") from error
    if device is not None and torch.device(device).index not in (None, own):
        raise BackendError(f"under torchrun a process has the GPU of its number, here cuda:{own}; give 'cuda', not '{found}'")
    return check_device(f"cuda:{own}")


@contextmanager
def _signals_are_the_firsts() -> Iterator[None]:
    """Pass over SIGINT and SIGTERM: the first process, which gets them, too, decides when the others may go."""
    if threading.current_thread() is not threading.main_thread():
        yield  # No other thread may say what signals do.
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: set by somebody outside of Python, and not to be had back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _joining(rank: int) -> str:
    return f"joining/{rank}"


def _failed(rank: int) -> str:
    return f"failed/{rank}"


def _done(rank: int) -> str:
    return f"done/{rank}"
