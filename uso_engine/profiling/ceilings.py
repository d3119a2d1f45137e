"""The best rates of the device that computes: a GPU's on record, a CPU's or any device's as measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from uso_engine.model.roofline import GPU, GPUS, Rates
from uso_kernels.attention import attention
from uso_kernels.cpu import widens
from uso_kernels.ragged import Ragged

_ROUNDS = 8


@dataclass(frozen=True)
class MeasuredRates:
    """Rates that were measured; see `uso_engine.model.roofline.Rates`.

    Args:
        gemm_rate: FLOP/s of the fastest of several matrix products.
        attention_rate: FLOP/s of attention: PyTorch's call, or what the engine takes in its place where that is faster.
        bandwidth_gbs: 10^9 bytes per second, read and written, of a copy larger than the caches.
        source: how.
    """

    gemm_rate: float
    attention_rate: float
    bandwidth_gbs: float
    source: str

    def best(self, other: MeasuredRates) -> MeasuredRates:
        """The higher of each of two measurements' rates: what disturbed one may have left the other alone."""
        gemm, attention = max(self.gemm_rate, other.gemm_rate), max(self.attention_rate, other.attention_rate)
        return MeasuredRates(gemm, attention, max(self.bandwidth_gbs, other.bandwidth_gbs), self.source)


def gpu_named(device: torch.device) -> GPU | None:
    """The entry of the roofline's table whose name is part of a GPU's; None where none is."""
    name = torch.cuda.get_device_name(device)
    return next((gpu for known, gpu in GPUS.items() if known in name), None)


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A GPU's rates on record where there are any, else measured: in half a second."""
    if device.type == "cuda" and (found := gpu_named(device)) is not None:
        return found
    return measure_rates(device, dtype)


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> MeasuredRates:
    """Measure a large product, an attention and a copy.

    Args:
        device: what computes.
        dtype: of the operands; where the engine widens them, float32.
        clock: seconds of a CPU: `time.process_time` is for a machine that others use too, with one thread.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.float32 if widens(torch.empty(0, dtype=dtype, device=device)) else dtype
    n, length, numbers = (8192, 4096, 2**28) if on_gpu else (1024, 512, 2**23)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    q = torch.randn(length, 8, 128, device=device, dtype=dtype)
    heads, layout = q.transpose(0, 1)[None], Ragged.pack([length], device)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    product_s = _least_s(lambda: F.linear(a, b), device, clock)
    torchs_s = _least_s(lambda: F.scaled_dot_product_attention(heads, heads, heads), device, clock)
    attention_s = min(torchs_s, _least_s(lambda: attention(q, q, q, layout, layout), device, clock))
    copy_s = _least_s(lambda: target.copy_(source), device, clock)
    attention_rate = 4.0 * length**2 * 8 * 128 / attention_s
    name = str(dtype).removeprefix("torch.")
    threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    return MeasuredRates(2.0 * n**3 / product_s, attention_rate, 8e-9 * numbers / copy_s, f"measured in {name}{threads}")


def _least_s(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few runs: a ceiling is what nothing disturbed."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter() if device.type == "cuda" else clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() if device.type == "cuda" else clock()) - start)
    return min(seconds[1:])
