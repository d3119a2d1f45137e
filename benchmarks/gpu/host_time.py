"""What a step costs the host: the time until everything is queued, beside what the device then takes for it."""

from __future__ import annotations

import statistics
import time

from benchmarks.step.against_diffusers import TIME
from benchmarks.step.engine_way import engine_step
from benchmarks.workload import Workload

from .bench import Bench


def run(bench: Bench) -> None:
    for workload in (bench.small, bench.workload):
        bench.attempt(f"{workload.grid[1] * 16} x {workload.grid[0] * 16}", lambda w=workload: queued(bench, w))  # type: ignore[misc]
        bench.free()


def queued(bench: Bench, workload: Workload) -> dict[str, float]:
    """Milliseconds of one step, on an idle device each time: queued, and finished."""
    step = engine_step(*bench.model(workload), (TIME,), "auto")
    for _ in range(3):
        step()
    host, whole = [], []
    for _ in range(2 * bench.rounds):
        bench.synchronize()
        start = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        bench.synchronize()
        whole.append(1e3 * (time.perf_counter() - start))
    found = {"queued_ms": statistics.median(host), "least_queued_ms": min(host), "finished_ms": statistics.median(whole)}
    bench.record("gpu_host_time", {"grid": list(workload.grid), **found})
    return found
