"""The first request of a fresh process: with nothing compiled yet, and with what an earlier process has compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import write_record

if TYPE_CHECKING:
    from .run import Comparison

ROOT = Path(__file__).resolve().parents[2]
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def print_first(comparison: Comparison, name: str) -> None:
    """Seconds of a way's first two requests of the first core case, as one line of JSON."""
    make = {key: build for key, build in comparison.make.items() if key == name}
    if not make:
        raise SystemExit(f"--first-of: unknown or not to be had here: {name!r}, expected one of {list(comparison.make)}")
    (way,) = comparison.make_ways(make)
    seconds = []
    for seed in (1, 2):
        start = time.process_time() if comparison.options.clock == "process" else time.perf_counter()
        way.request(comparison.size.core()[0], seed)
        end = time.process_time() if comparison.options.clock == "process" else time.perf_counter()
        seconds.append(end - start)
    way.close()
    print(json.dumps({"first_s": seconds[0], "second_s": seconds[1]}))


def run(comparison: Comparison, given: Sequence[str]) -> None:
    """Two processes for each way, which share caches that were empty before the first; one record for each way."""
    arguments = [argument for argument in given if argument != "--first-requests"]
    for name in comparison.make:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, **{cache: str(Path(folder) / cache.lower()) for cache in CACHES}}
            cold, warm = (_measured(name, arguments, environment) for _ in range(2))
        record = {
            **comparison.key,
            "case": comparison.size.core()[0].name,
            "way": name,
            "cold_s": cold["first_s"],
            "warm_s": warm["first_s"],
            "second_s": warm["second_s"],
            "compile_s": max(0.0, cold["first_s"] - warm["first_s"]),
            "command": comparison.command,
        }
        write_record("compare_first", record, comparison.path)
        print(f"{name:28s} cold {cold['first_s']:7.2f} s, warm {warm['first_s']:7.2f} s, second {warm['second_s']:7.2f} s")


def _measured(name: str, arguments: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """What a process of one way prints.

    Raises:
        SystemExit: it failed; says what it printed last.
    """
    command = [sys.executable, "-m", "benchmarks.compare", *arguments, "--first-of", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
