"""`uso-engine serve` as a process of its own, with the embedded model, for loads that are put on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
_COMMAND = (sys.executable, "-c", "from uso_engine.cli import main; main()", "serve", "--port", "0", "--device", "cpu")


@dataclass(frozen=True)
class RealServer:
    """A running server.

    Args:
        url: where it listens.
        process: its process.
    """

    url: str
    process: subprocess.Popen[bytes]

    def resident_mib(self) -> float:
        """Memory of the process that is in RAM."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def open_files(self) -> int:
        """Descriptors that the process holds."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def threads(self) -> int:
        """Threads of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


@contextmanager
def real_server(folder: Path, *options: str) -> Iterator[RealServer]:
    """Start it, wait until it is ready, and end it with SIGTERM.

    Args:
        folder: for its storage and its log.
        options: more of the command line.
    """
    command = [*_COMMAND, "--storage", (folder / "storage").as_uri(), *options]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=variables)
    listening: list[str] = []
    found = threading.Event()

    def copy() -> None:
        assert process.stderr is not None
        with (folder / "log").open("wb", buffering=0) as log:
            for line in process.stderr:
                log.write(line)
                if b'"listening"' in line:
                    listening.append(json.loads(line)["url"])
                    found.set()
        found.set()

    threading.Thread(target=copy, daemon=True).start()
    try:
        if not found.wait(300) or not listening:
            raise SystemExit((folder / "log").read_text())
        while httpx.get(f"{listening[0]}/readyz").status_code != 200:
            if process.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.2)
        yield RealServer(listening[0], process)
    finally:
        process.terminate()
        process.wait(120)
