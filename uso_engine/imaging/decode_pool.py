"""Processes that decode pictures, so that a decoder which crashes, fills memory or does not end harms one request only."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from PIL import Image

from uso_engine.errors import BackendError, ImageError
from uso_engine.imaging.decode import Formats
from uso_engine.imaging.decode_worker import READY
from uso_engine.imaging.rgb import Alpha

logger = logging.getLogger(__name__)

_BLOCK = 2**18
_LONGEST_HEAD = 65_536
_START_S = 60.0
_PACKAGES = Path(__file__).parents[2]


class DecodePool:
    """A fixed number of decoding processes; thread-safe, usable in a ``with`` statement.

    A picture that takes longer than its deadline ends with its process, which is replaced; so does one whose decoder crashes.

    Args:
        processes: how many pictures are decoded at the same time.
        memory_bytes: the most address space of each process. 3 GiB are enough for every picture of 8192 x 8192 pixels.

    Raises:
        ValueError: no process, or too little memory to start one.
    """

    def __init__(self, processes: int = 2, *, memory_bytes: int = 3 * 2**30) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        if memory_bytes < 512 * 2**20:
            raise ValueError(f"memory_bytes must be at least {512 * 2**20:,}, got {memory_bytes:,}")
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[_Process] = set()
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()  # None: a place whose process has yet to be started
        for _ in range(processes):
            self._idle.put(self._start())

    def decode(
        self,
        data: bytes,
        *,
        max_pixels: int,
        label: str,
        deadline_s: float = 10.0,
        alpha: Alpha = "white",
        formats: Formats = "all",
    ) -> Image.Image:
        """Decode a picture and bring it to upright RGB, to the same pixels as `open_image` in this process.

        Waits for a free process first; with everybody's deadline, so does that wait end.

        Args:
            data: the encoded picture.
            max_pixels: the most pixels (width x height), compared with the header before anything is decoded.
            label: what error messages call the picture.
            deadline_s: the most seconds that decoding may take.
            alpha: as for `open_image`.
            formats: which are decoded.

        Returns:
            The RGB image.

        Raises:
            ImageError: not a picture that is accepted, or one that took too long, too much memory, or crashed its decoder.
            ValueError: the pool is closed.
        """
        process = self._idle.get()
        try:
            process = process or self._start()
            job = {"max_pixels": max_pixels, "label": label, "deadline_s": deadline_s, "alpha": alpha, "formats": formats}
            return process.decode(data, job, max_pixels=max_pixels, deadline_s=deadline_s)
        except _ProcessEnded as ended:
            logger.warning("%s: its decoding process is replaced: %s", label, ended)
            raise ImageError(f"{label}: {ended}") from ended
        finally:
            if process is not None and not process.usable:
                self._let_go(process)
                process = None
            self._idle.put(process)

    def close(self) -> None:
        """End every process, also those at work, whose callers get an `ImageError`. Again does nothing."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()  # whoever waits for it meets the end of its answers, and closes its pipes
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for waiting in idle:
            if waiting is not None:
                self._let_go(waiting)
            self._idle.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise ValueError("this pool of decoding processes is closed")
            process = _Process(self._memory_bytes)
            self._running.add(process)
            return process

    def _let_go(self, process: _Process) -> None:
        process.end()
        with self._lock:
            self._running.discard(process)


class _ProcessEnded(Exception):
    """A process that had to be ended or ended by itself; says what for, in words for the caller."""


class _Process:
    """One decoding process and the pipes to it."""

    def __init__(self, memory_bytes: int) -> None:
        # Nothing of this process's environment, which may hold keys; no module from the current folder.
        environment = {"PYTHONPATH": str(_PACKAGES), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "uso_engine.imaging.decode_worker", str(memory_bytes)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interrupt from the terminal is for the server, which closes the pool when it is done
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self._ready = False
        self.usable = True

    def decode(self, data: bytes, job: dict[str, object], *, max_pixels: int, deadline_s: float) -> Image.Image:
        if not self._ready:
            self._read(len(READY), time.monotonic() + _START_S, "the decoding process did not start")
            self._ready = True
        end = time.monotonic() + deadline_s
        too_long = f"decoding it took longer than {deadline_s:g} s"
        self._write(json.dumps({"bytes": len(data), **job}).encode() + b"\n", end, too_long)
        self._write(data, end, too_long)
        answer = json.loads(self._read_line(end, too_long))
        if "error" in answer:
            raise (BackendError if answer.get("is_backend_error") else ImageError)(str(answer["error"]))
        width, height = (int(side) for side in answer["size"])
        if width < 1 or height < 1 or width * height > max_pixels:  # a process that a picture took over says what it likes
            raise self._fail("decoding it went wrong")
        return Image.frombytes("RGB", (width, height), self._read(3 * width * height, end, too_long))

    def kill(self) -> None:
        """End the process; its pipes stay open for whoever reads them."""
        self.usable = False
        self._process.kill()

    def end(self) -> None:
        """End the process and close its pipes."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _fail(self, why: str) -> _ProcessEnded:
        self.usable = False
        return _ProcessEnded(why)

    def _wait(self, pipe: int, event: int, end: float, too_long: str) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            if not selector.select(max(0.0, end - time.monotonic())):
                raise self._fail(too_long)

    def _write(self, data: bytes, end: float, too_long: str) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._input, selectors.EVENT_WRITE, end, too_long)
            try:
                rest = rest[os.write(self._input, rest[:_BLOCK]) :]
            except OSError as error:
                raise self._fail("its decoder crashed") from error

    def _read_some(self, most: int, end: float, too_long: str) -> bytes:
        self._wait(self._output, selectors.EVENT_READ, end, too_long)
        data = os.read(self._output, most)
        if not data:
            raise self._fail("its decoder crashed")
        return data

    def _read(self, count: int, end: float, too_long: str) -> bytearray:
        data = bytearray()
        while len(data) < count:
            data += self._read_some(min(_BLOCK, count - len(data)), end, too_long)
        return data

    def _read_line(self, end: float, too_long: str) -> bytearray:
        data = bytearray()
        while not data.endswith(b"\n"):
            data += self._read_some(1, end, too_long)
            if len(data) > _LONGEST_HEAD:
                raise self._fail("decoding it went wrong")
        return data
