"""Time by class of kernel, beside what the roofline says each class needs at the least."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypedDict

from torch.profiler import profile

from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Operation, Rates, Tokens, step_operations

# In this order: the first that fits a kernel's name. Ours go by their functions, the libraries' by what they have in common.
CLASSES = (
    ("gated residual, norm", r"gated_residual|layer_norm_modulate|LayerNorm"),
    ("q/k norm, rotation", r"qk_norm_rope"),
    ("gelu", r"gelu_concat|aten::gelu|GeluCUDA|GeluType"),
    ("quantising", r"quantize_|value_amax"),
    ("attention", r"_attention_kernel|flash|fmha|sdpa|cudnn.*attn|cudnn_generated.*fort"),
    ("products", r"gemm|nvjet|cutlass|splitk|addmm|mm_kernel|matmul|ampere_|sm90_|sm80_|mkl|bmm"),
    ("copies", r"copy|memcpy|Memcpy|cat|fill|memset|Memset"),
    ("rows", r"index|gather|scatter|split_streams"),
    ("Euler step", r"euler"),
)


class KernelTime(NamedTuple):
    """Milliseconds of a kernel's launches together, and how many there were."""

    milliseconds: float
    launches: int


class ClassTime(TypedDict, total=False):
    """A class's milliseconds and launches, its floor, and the floor's part of the time where it took any."""

    ms: float
    launches: float
    floor_ms: float
    share_of_floor: float


def kernel_class(operation: Operation) -> str:
    """The class of kernels that compute an operation, as profiles name it."""
    if operation.kind == "gemm":
        return "products"
    if operation.kind == "attention":
        return "attention"
    words = {"q/k": "q/k norm, rotation", "Euler": "Euler step", "sum of both": "products"}
    return next((name for word, name in words.items() if word in operation.name), "gated residual, norm")


def class_of(kernel: str) -> str:
    """The class that a kernel's name belongs to."""
    return next((name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE)), "other")


def kernel_times(profiler: profile, *, on_gpu: bool) -> dict[str, KernelTime]:
    """Time and launches of every kernel that a profiler saw; of every operation, without those in it, on a CPU."""
    found: dict[str, KernelTime] = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found[event.key] = KernelTime(microseconds / 1e3, event.count)
    return found


def floors_by_class(params: TransformerParams, sequences: Iterable[Tokens], rates: Rates) -> dict[str, float]:
    """Milliseconds that the sequences of one step need at the least, by class."""
    sums: dict[str, float] = {}
    for tokens in sequences:
        for operation in step_operations(params, tokens):
            name = kernel_class(operation)
            sums[name] = sums.get(name, 0.0) + operation.floor_ms(rates)
    return sums


def times_by_class(kernels: Mapping[str, KernelTime], floors: Mapping[str, float]) -> dict[str, ClassTime]:
    """Every class's time beside its floor, the longest first."""
    sums = dict.fromkeys(floors, KernelTime(0.0, 0))
    for name, time in kernels.items():
        before = sums.get(class_of(name), KernelTime(0.0, 0))
        sums[class_of(name)] = KernelTime(before.milliseconds + time.milliseconds, before.launches + time.launches)
    table: dict[str, ClassTime] = {}
    for name, (milliseconds, launches) in sorted(sums.items(), key=lambda entry: -entry[1].milliseconds):
        floor = floors.get(name, 0.0)
        table[name] = {"ms": milliseconds, "launches": float(launches), "floor_ms": floor}
        if milliseconds:
            table[name]["share_of_floor"] = floor / milliseconds
    return table
