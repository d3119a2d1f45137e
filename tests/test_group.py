"""Processes that find each other over a store: how long for the others, and how long for what they have to say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from queue import Empty, SimpleQueue

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented there, not declared

from uso_engine.errors import ParallelError
from uso_engine.parallel import group as group_module
from uso_engine.parallel.group import Group, connect_store, within

CPU = torch.device("cpu")


def test_a_process_that_never_comes_is_not_waited_for_without_end() -> None:
    with pytest.raises(ParallelError, match=r"process 0 of 2 could not join the others: .*[Tt]imeout"):
        Group(HashStore(), 0, 2, CPU, 60, joining=timedelta(seconds=0.2))


def test_an_engine_may_be_idle_for_longer_than_processes_take_to_join() -> None:
    store, heard = HashStore(), list[str]()

    def follow() -> None:
        group = Group(store, 1, 2, CPU, 60, joining=timedelta(seconds=2))
        said: str = group.share_object(None)
        heard.append(said)

    thread = threading.Thread(target=follow)
    thread.start()
    leader = Group(store, 0, 2, CPU, 60, joining=timedelta(seconds=2))
    thread.join(2.5)
    assert leader.share_object("a step") == "a step"
    thread.join()
    assert heard == ["a step"]


def test_what_takes_longer_than_is_said_is_given_up() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0:00:00\.1"):
        within(timedelta(seconds=0.1), end.wait)
    end.set()
    assert within(timedelta(minutes=1), lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(timedelta(minutes=1), lambda: 1 // 0)


def test_what_the_end_of_the_process_waits_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever presses Ctrl-C sees why the process is still there; nothing is said where nothing is waited for."""
    end = threading.Event()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)  # To the main thread, which waits, and not to this one.
        end.wait()

    with pytest.raises(KeyboardInterrupt):
        within(timedelta(minutes=1), interrupt)
    end.set()
    told = "still connecting, which nothing can interrupt: this process ends when it has given up, about 0:01:00 after it began"
    assert told in caplog.text
    caplog.clear()
    end.clear()
    with pytest.raises(TimeoutError):
        within(timedelta(seconds=0.1), end.wait)
    end.set()
    assert "about 0:00:00.100000 after it began" in caplog.text
    caplog.clear()
    with pytest.raises(ZeroDivisionError):
        within(timedelta(minutes=1), lambda: 1 // 0)
    assert not caplog.records


def test_no_wait_is_so_long_that_an_interrupt_just_before_it_would_seem_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for one, then begins to wait, and looks again when that wait is over."""
    now_s, waits = 100.0, list[float]()

    class Silent(SimpleQueue[int]):
        def get(self, block: bool = True, timeout: float | None = None) -> int:
            nonlocal now_s
            assert timeout is not None
            waits.append(timeout)
            now_s += timeout
            raise Empty

    monkeypatch.setattr("uso_engine.parallel.group.time.monotonic", lambda: now_s)
    with pytest.raises(Empty):
        group_module._got(Silent(), timedelta(seconds=2.5))
    assert waits == [1.0, 1.0, 0.5]


def test_a_store_that_nobody_serves_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "CONNECTING", timedelta(seconds=0.2))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # Taken, and nobody listens.
        port = other.getsockname()[1]
        with pytest.raises(ParallelError, match=rf"serves a group on port {port}: no answer within 0:00:00\.2"):
            connect_store(port, 2)


def test_a_process_that_could_not_connect_ends_as_it_says() -> None:
    """An interpreter that ends beneath a call into PyTorch is aborted when the call comes back."""
    script = """
import socket
from datetime import timedelta
from uso_engine.errors import ParallelError
from uso_engine.parallel import group

group.CONNECTING = timedelta(seconds=0.2)
with socket.socket() as other:
    other.bind(("127.0.0.1", 0))
    try:
        group.connect_store(other.getsockname()[1], 2)
    except ParallelError:
        raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL, check=False).returncode == 7
