"""A step's time on the device by class of kernel, beside what the roofline says each class needs at the least."""

from __future__ import annotations

import re

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step.against_diffusers import TIME
from benchmarks.step.engine_way import engine_step
from benchmarks.step.prediction import kernel_class
from benchmarks.step.roofline import GPU, GPUS, step_operations

from .bench import Bench

# In this order: the first that fits a kernel's name. Ours go by their functions, the libraries' by what they have in common.
CLASSES = (
    ("gated residual, norm", r"gated_residual|layer_norm_modulate|LayerNorm"),
    ("q/k norm, rotation", r"qk_norm_rope"),
    ("gelu", r"gelu_concat|aten::gelu|GeluCUDA|GeluType"),
    ("quantising", r"quantize_rows|dequantize"),
    ("attention", r"_attention_kernel|flash|fmha|sdpa|cudnn.*attn|cudnn_generated.*fort"),
    ("products", r"gemm|nvjet|cutlass|splitk|addmm|mm_kernel|matmul|ampere_|sm90_|sm80_|mkl|bmm"),
    ("copies", r"copy|memcpy|Memcpy|cat|fill|memset|Memset"),
    ("rows", r"index|gather|scatter|split_streams"),
    ("Euler step", r"euler"),
)


def run(bench: Bench) -> None:
    transformer, inputs, latents = bench.model()
    step = engine_step(transformer, inputs, latents, (TIME,), "auto")
    step()
    rows = kernel_times(bench, step)
    sums: dict[str, list[float]] = {}
    for name, (milliseconds, count) in rows.items():
        found = sums.setdefault(class_of(name), [0.0, 0.0])
        found[0] += milliseconds
        found[1] += count
    floors = floors_by_class(bench)
    table: dict[str, dict[str, float]] = {}
    for name in sorted(sums.keys() | floors.keys(), key=lambda name: -sums.get(name, [0.0])[0]):
        milliseconds, count = sums.get(name, [0.0, 0.0])
        floor = floors.get(name, 0.0)
        table[name] = {"ms": milliseconds, "launches": count, "floor_ms": floor}
        if milliseconds:
            table[name]["share_of_floor"] = floor / milliseconds
    bench.save("classes", table)
    bench.save("all kernels, ms", sum(milliseconds for milliseconds, _ in rows.values()))
    bench.save("step beside it, ms", bench.median_ms(step))
    longest = sorted(rows.items(), key=lambda row: -row[1][0])[:12]
    bench.save("longest kernels, ms and launches", {name[:70]: list(found) for name, found in longest})
    bench.record("gpu_profile", {"tokens": bench.tokens.all, "classes": table})


def kernel_times(bench: Bench, step: object) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of every kernel of one step; of every operation on a CPU."""
    assert callable(step)
    activities = [ProfilerActivity.CUDA] if bench.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
        bench.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found[event.key] = (microseconds / 1e3, float(event.count))
    return found


def class_of(kernel: str) -> str:
    """The class that a kernel's name belongs to."""
    return next((name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def floors_by_class(bench: Bench) -> dict[str, float]:
    """Milliseconds at the best rates on record of the GPU that this is, or of an H100."""
    gpu = gpu_of(torch.cuda.get_device_name() if bench.on_gpu else "")
    sums: dict[str, float] = {}
    for operation in step_operations(bench.workload.params, bench.tokens):
        name = kernel_class(operation)
        sums[name] = sums.get(name, 0.0) + operation.floor_ms(gpu)
    return sums


def gpu_of(name: str) -> GPU:
    """The entry of the roofline's table whose name is part of a device's name."""
    return next((gpu for known, gpu in GPUS.items() if known in name), GPUS["H100"])
