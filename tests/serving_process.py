"""The server as a process of its own, for tests that talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

TESTS = Path(__file__).resolve().parent
_START_S = 120
# One client for all: reading the certificates of another for each call would be most of a test's time.
HTTP = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0), timeout=60)


@dataclass
class Served:
    """A running server.

    Args:
        process: its process.
        url: where it listens.
        log: its standard error.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def lines(self, message: str = "request") -> list[dict[str, object]]:
        """Log lines with this message; every line has to be JSON."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if line["message"] == message]

    def line_of(self, request_id: str) -> dict[str, object]:
        """The log line of a request; it is written after its answer was sent."""
        for _ in range(500):
            found = [line for line in self.lines() if line["request_id"] == request_id]
            if found:
                return found[0]
            threading.Event().wait(0.02)
        raise AssertionError(f"no line of {request_id} in {self.log.read_text()}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(60)


def double_server(folder: Path, port: int, *settings: str, storage: str | None = None) -> list[str]:
    """The command of a server with the tests' engine."""
    kept = storage or (folder / "storage").as_uri()
    return [sys.executable, str(TESTS / "served_double.py"), str(port), kept, *settings]


@contextmanager
def serving(command: list[str], log: Path, **environment: str) -> Iterator[Served]:
    """Run a server until the block ends. Its standard error goes to a file."""
    paths = os.pathsep.join(str(path) for path in (TESTS.parent, TESTS.parent / "kernels", TESTS))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables)
    assert process.stderr is not None
    # Written through a thread, so that the line that says where it listens is waited for without looking again and again.
    listening: list[str] = []
    found = threading.Event()

    def copy() -> None:
        assert process.stderr is not None
        with log.open("wb", buffering=0) as sink:
            for line in process.stderr:
                sink.write(line)
                if b'"listening"' in line:
                    listening.append(json.loads(line)["url"])
                    found.set()
        found.set()

    copier = threading.Thread(target=copy)
    copier.start()
    try:
        assert found.wait(_START_S) and listening, log.read_text()
        yield Served(process, listening[0], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        copier.join()
        process.stderr.close()


def wait_ready(served: Served) -> None:
    """Until the engine is loaded."""
    while HTTP.get(f"{served.url}/readyz").status_code != 200:
        assert served.process.poll() is None, served.log.read_text()
        threading.Event().wait(0.1)


def free_port() -> int:
    """A port that was free a moment ago; for servers that come back to the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
