"""A step's time on the device by class of kernel, beside what the roofline says each class needs at the least."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.step.against_diffusers import TIME
from benchmarks.step.engine_way import engine_step
from uso_engine.model.roofline import GPUS
from uso_engine.profiling.ceilings import gpu_named
from uso_engine.profiling.kernel_classes import KernelTime, floors_by_class, kernel_times, times_by_class

from .bench import Bench


def run(bench: Bench) -> None:
    transformer, inputs, latents = bench.model()
    step = engine_step(transformer, inputs, latents, (TIME,), "auto")
    step()
    kernels = profiled(bench, step)
    # A rehearsal on a CPU is held against an H100.
    rates = (gpu_named(bench.device) if bench.on_gpu else None) or GPUS["H100"]
    table = times_by_class(kernels, floors_by_class(bench.workload.params, [bench.tokens], rates))
    bench.save("classes", table)
    bench.save("all kernels, ms", sum(time.milliseconds for time in kernels.values()))
    bench.save("step beside it, ms", bench.median_ms(step))
    longest = sorted(kernels.items(), key=lambda row: -row[1].milliseconds)[:12]
    bench.save("longest kernels, ms and launches", {name[:70]: list(found) for name, found in longest})
    bench.record("gpu_profile", {"tokens": bench.tokens.all, "classes": table})


def profiled(bench: Bench, step: Callable[[], object]) -> dict[str, KernelTime]:
    """Milliseconds and launches of every kernel of one step; of every operation on a CPU."""
    with profile(activities=[ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        bench.synchronize()
    return kernel_times(profiler, on_gpu=bench.on_gpu)
