"""What a step costs the host: the time until everything is queued, beside what the device then takes for it."""

from __future__ import annotations

import statistics
import time

from torch import Tensor

from benchmarks.step.against_diffusers import TIME
from benchmarks.step.engine_way import Evaluate, captured_step, engine_step
from benchmarks.workload import Inputs, Workload
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.cuda_capture import CudaCapturing

from .bench import Bench

CAPTURING = CudaCapturing()


def run(bench: Bench) -> None:
    for workload in (bench.small, bench.workload):
        picture, made = f"{workload.grid[1] * 16} x {workload.grid[0] * 16}", bench.model(workload)
        bench.attempt(picture, lambda w=workload, m=made: eager(bench, w, m))  # type: ignore[misc]
        reason = CAPTURING.missing(bench.device)
        if reason is None:
            bench.attempt(f"{picture}, CUDA graph", lambda w=workload, m=made: captured(bench, w, m))  # type: ignore[misc]
        else:
            bench.save(f"{picture}, CUDA graph", reason)
        del made
        bench.free()


def eager(bench: Bench, workload: Workload, made: tuple[Transformer, Inputs, Tensor]) -> dict[str, float]:
    return queued(bench, workload, "eager", engine_step(*made, (TIME,), "auto"))


def captured(bench: Bench, workload: Workload, made: tuple[Transformer, Inputs, Tensor]) -> dict[str, float]:
    """The same of the step as a CUDA graph."""
    return queued(bench, workload, "CUDA graph", captured_step(*made, (TIME,), "auto", CAPTURING))


def queued(bench: Bench, workload: Workload, way: str, step: Evaluate) -> dict[str, float]:
    """Milliseconds of one step, on an idle device each time: queued, and finished."""
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
    bench.record("gpu_host_time", {"grid": list(workload.grid), "way": way, **found})
    return found
