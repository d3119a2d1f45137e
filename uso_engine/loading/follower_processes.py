"""The other processes of an engine that computes with several: started, watched and ended by the first one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import IO

import torch

from uso_engine.config import EngineConfig
from uso_engine.errors import BackendError, ParallelError, USOError
from uso_engine.parallel.follower import follow
from uso_engine.parallel.group import WITHOUT_END, Group, connect_store, serve_store
from uso_engine.parallel.leader import Leader
from uso_engine.precision.tiers import TierName

from .transformer import load_transformer

_LOADING = timedelta(minutes=30)
_ENDING_S = 20.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Beginning:
    """What a process is told when it starts.

    Args:
        config: of the engine.
        device: where it computes.
        tier: of the transformer's weights.
        attention: attention backend by name, or "auto".
        rank: of the process, from 1.
        port: of the store on this machine.
        threads: for PyTorch's operations on a CPU.
    """

    config: EngineConfig
    device: str
    tier: TierName
    attention: str
    rank: int
    port: int
    threads: int


class FollowerProcesses:
    """Every process but the first, each loading the transformer for itself.

    Args:
        config: of the engine; `parallel.ulysses` says how many processes there are.
        device: of the first process; on GPUs the others take those that follow it.
        tier: of the transformer's weights.
        attention: attention backend by name, or "auto".

    Raises:
        BackendError: there are not as many GPUs.
    """

    def __init__(self, config: EngineConfig, *, device: torch.device, tier: TierName, attention: str) -> None:
        self._config, self._device, self._size = config, device, config.parallel.ulysses
        devices = follower_devices(device, self._size)
        self._store = serve_store(self._size)
        self._said: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        threads = max(1, torch.get_num_threads() // self._size)
        try:
            for rank, where in enumerate(devices, 1):
                beginning = Beginning(config, where, tier, attention, rank, self._store.port, threads)
                self._start(beginning)
        except BaseException:
            self.end()
            raise

    def _start(self, beginning: Beginning) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process may write to it
        self._said.append(said)
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        self._processes.append(process)
        assert process.stdin is not None
        try:
            pickle.dump(beginning, process.stdin)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise ParallelError(f"process {beginning.rank} ended when it was started: {self._last_words()}") from error

    def join(self) -> Leader:
        """Wait until all have loaded, and become the first of the group.

        Raises:
            ParallelError: one ended before that, or takes longer than half an hour.
        """
        names = [f"joining/{rank}" for rank in range(1, self._size)]
        deadline = time.monotonic() + _LOADING.total_seconds()
        while not self._store.check(names):
            if any(process.poll() is not None for process in self._processes):
                raise ParallelError(f"a process ended before it could join: {self.end()}")
            if time.monotonic() > deadline:
                raise ParallelError(f"a process has not loaded the transformer within {_LOADING}: {self.end()}")
            time.sleep(_POLL_S)
        group = Group(self._store, 0, self._size, self._device, self._config.parallel.step_timeout_s)
        return Leader(group, self.end)

    def end(self) -> str:
        """End them, where they do not end by themselves now, and say what they said last. A second call does nothing."""
        for process in self._processes:
            if process.stdin is not None and not process.stdin.closed:
                # That is how a process learns that the first one is gone.
                process.stdin.close()
        deadline = time.monotonic() + _ENDING_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        words = self._last_words()
        for said in self._said:
            said.close()
        self._processes.clear()
        self._said.clear()
        return words

    def _last_words(self) -> str:
        words = []
        for rank, (process, said) in enumerate(zip(self._processes, self._said, strict=True), 1):
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            status = process.poll()
            if status not in (0, None):
                words.append(f"process {rank} ended with {status}" + (f": {lines[-1]}" if lines else ""))
        return "; ".join(words)


def follower_devices(device: torch.device, size: int) -> list[str]:
    """Where the processes after the first compute.

    Raises:
        BackendError: there are not as many GPUs.
    """
    if device.type != "cuda":
        return [str(device)] * (size - 1)
    first = device.index or 0
    found, last = torch.cuda.device_count(), first + size - 1
    if found <= last:
        raise BackendError(f"[parallel] ulysses = {size} needs GPUs {first} to {last}; this machine has {found}")
    return [f"cuda:{first + rank}" for rank in range(1, size)]


def main() -> None:
    """Be one of the processes: read what to do from standard input, and end when that ends."""
    # Ctrl-C reaches every process of a terminal; the first one decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    beginning: Beginning = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    threading.Thread(target=_end_with_the_first, name="first process", daemon=True).start()
    torch.set_num_threads(beginning.threads)
    try:
        _follow(beginning)
    except USOError as error:
        sys.exit(str(error))


def _follow(beginning: Beginning) -> None:
    device, parallel = torch.device(beginning.device), beginning.config.parallel
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = load_transformer(beginning.config, device=device, tier=beginning.tier, attention=beginning.attention)
    try:
        store = connect_store(beginning.port, parallel.ulysses)
        store.set(f"joining/{beginning.rank}", "")
        # The first process comes when all others have loaded; where it does not, `_end_with_the_first` ends this one.
        group = Group(store, beginning.rank, parallel.ulysses, device, parallel.step_timeout_s, joining=WITHOUT_END)
        follow(group, loaded)
    finally:
        loaded.close()


def _end_with_the_first() -> None:
    """End this process at once, wherever it waits, when the first one closes the pipe or is gone."""
    # Not through `sys.stdin`: an interpreter that ends while a thread reads there aborts.
    while os.read(0, 1024):
        pass
    time.sleep(_ENDING_S / 2)  # Told to end, it does so by itself.
    os._exit(1)
