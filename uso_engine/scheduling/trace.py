"""What an engine's threads did when, in the format that Chrome's chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from uso_engine.imaging.atomic import write_atomically
from uso_engine.local_names import written_path

MOST_EVENTS = 1_000_000


class Trace:
    """Stretches of work by lane, one lane for each thread; the first `MOST_EVENTS` of them.

    Args:
        path: where they are written to.

    Raises:
        ValueError: no path.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = written_path("path", path)
        self._events: list[dict[str, object]] = []
        self._lanes: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, lane: str, name: str, start_s: float, end_s: float, **details: object) -> None:
        """Remember a stretch.

        Args:
            lane: who did it.
            name: what was done.
            start_s: on `time.perf_counter`'s clock.
            end_s: likewise.
            details: shown beside it.
        """
        with self._lock:
            if len(self._events) >= MOST_EVENTS:
                return
            number = self._lanes.setdefault(lane, len(self._lanes))
            times = {"ts": 1e6 * start_s, "dur": 1e6 * (end_s - start_s)}
            self._events.append({"name": name, "ph": "X", "pid": 0, "tid": number, **times, "args": details})

    def write(self) -> None:
        """Write what is there.

        Raises:
            OutputError: the file cannot be written.
        """
        with self._lock:
            names = [
                {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}}
                for lane, number in self._lanes.items()
            ]
            text = json.dumps({"traceEvents": [*names, *self._events], "displayTimeUnit": "ms"})
        write_atomically(self._path, text.encode())
