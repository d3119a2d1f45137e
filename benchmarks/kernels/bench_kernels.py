"""Each kernel against plain PyTorch and `torch.compile`, with the share of a ceiling measured in the same run.

    python -m pytest benchmarks/kernels/bench_kernels.py -o python_files='bench_*.py' -o python_functions='bench_*'

On a GPU every call works on the next of several copies of its operands, together larger than the L2 cache. The result is
compared with the reference before it is timed. On a CPU the operations are their references: a smoke test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import interleave, write_record
from uso_kernels.attention import attention, available_backends
from uso_kernels.gated_residual import gated_residual_layer_norm_modulate, gated_residual_reference
from uso_kernels.gelu_concat import gelu_concat, gelu_concat_reference
from uso_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_quantized, layer_norm_modulate_reference
from uso_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from uso_kernels.quantize_rows import quantize_rows, quantize_rows_reference
from uso_kernels.ragged import Ragged
from uso_kernels.split_streams import split_streams, split_streams_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
L2_BYTES = 128 * 2**20
WARMUP_S = 0.2 if DEVICE.type == "cuda" else 0.0


class Case(NamedTuple):
    """One operation: ours, plain PyTorch, what both take, bytes it must move, FLOPs it must make (0: it is bound by memory)."""

    ours: Callable[..., object]
    plain: Callable[..., object]
    make: Callable[[], tuple[object, ...]]
    moved_bytes: int
    flops: int = 0


def gated_plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    total = gated_residual_reference(x, y, gate, tiles)
    return total, layer_norm_modulate_reference(total, shift, scale, tiles)


def norm_quantized_plain(x: Tensor, shift: Tensor, scale: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_reference(layer_norm_modulate_reference(x, shift, scale, tiles), torch.int8)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def norm_quantized(x: Tensor, shift: Tensor, scale: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm_modulate_quantized(x, shift, scale, tiles, torch.int8)


def cases(rows: int, width: int) -> dict[str, Case]:
    """Every kernel at T = rows and C = width."""
    heads, layout = width // 128, Ragged.pack([rows], DEVICE)
    tiles, size, text = layout.tile_sequence, 2 * rows * width, rows // 128 * 16
    order = torch.arange(rows, device=DEVICE)

    def rotary() -> tuple[object, ...]:
        q, k, v = (normal(rows, heads, 128) for _ in range(3))
        angles = torch.randn(rows, 64, device=DEVICE)
        return normal(rows, 3 * width), normal(128), normal(128), angles.cos(), angles.sin(), None, q, k, v

    def norm() -> tuple[object, ...]:
        return normal(rows, width), normal(1, width), normal(1, width), tiles

    def gated() -> tuple[object, ...]:
        return normal(rows, width), normal(rows, width), normal(1, width), normal(1, width), normal(1, width), tiles

    return {
        "layer_norm_modulate": Case(layer_norm_modulate, layer_norm_modulate_reference, norm, 2 * size),
        "layer_norm_modulate_quantized": Case(norm_quantized, norm_quantized_plain, norm, 3 * size // 2),
        "gated_residual_layer_norm_modulate": Case(gated_residual_layer_norm_modulate, gated_plain, gated, 4 * size),
        "qk_norm_rope": Case(qk_norm_rope, qk_norm_rope_reference, rotary, 6 * size + 2 * 4 * 64 * rows),
        "split_streams": Case(
            lambda x: split_streams(x, order[:text], order[text:]),
            lambda x: split_streams_reference(x, order[:text], order[text:]),
            lambda: (normal(rows, width),),
            2 * size,
        ),
        "gelu_concat": Case(
            gelu_concat, gelu_concat_reference, lambda: (normal(rows, width), normal(rows, 4 * width)), 10 * size
        ),
        "quantize_rows": Case(
            lambda x: quantize_rows(x, torch.int8),
            lambda x: quantize_rows_reference(x, torch.int8),
            lambda: (normal(rows, 5 * width),),
            15 * size // 2,
        ),
    }


def attention_cases(rows: int, width: int) -> dict[str, Case]:
    """Every attention backend that runs here, one long sequence."""
    layout, heads = Ragged.pack([rows], DEVICE), width // 128

    def make() -> tuple[object, ...]:
        q, k, v = (torch.randn(rows, heads, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        return q, k, v, layout, layout

    return {
        f"attention {name}": Case(
            lambda *given, name=name: attention(*given, backend=name),
            lambda *given: attention(*given, backend="dense"),
            make,
            8 * rows * width,
            4 * rows * rows * width,
        )
        for name, reason in available_backends(DEVICE).items()
        if reason is None and not (name == "triton" and DEVICE.type == "cpu")
    }


NAMES = [*cases(256, 128), *attention_cases(256, 128)]


@cache
def ceilings() -> tuple[float, float]:
    """Bytes per second of a copy and FLOP/s of a bfloat16 product, measured here and now."""
    size = 2**28 if DEVICE.type == "cuda" else 2**20
    source = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    n = 8192 if DEVICE.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    variants = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleave(variants, rounds=10, device=DEVICE, warmup_s=WARMUP_S)
    return 4e3 * size / times["copy"]["p20_ms"], 2e3 * n**3 / times["product"]["p20_ms"]


def copies(case: Case) -> Callable[[], tuple[object, ...]]:
    """Operands in turn, so that none is found in the cache."""
    count = max(1, min(16, L2_BYTES // max(1, case.moved_bytes) + 1)) if DEVICE.type == "cuda" else 1
    given = cycle([case.make() for _ in range(count)])
    return lambda: next(given)


def results_of(run: Callable[..., object], given: tuple[object, ...]) -> list[Tensor]:
    """What an operation returns; the operands it wrote to if it returns nothing."""
    result = run(*given)
    found = given if result is None else result if isinstance(result, tuple) else (result,)
    return [x.clone() for x in found if isinstance(x, Tensor)]


def agree(case: Case) -> None:
    """Compare with the reference; a kernel that is wrong is not timed."""
    given = case.make()
    for ours, plain in zip(results_of(case.ours, given), results_of(case.plain, given), strict=True):
        assert (ours.float() - plain.float()).norm() <= 0.03 * plain.float().norm()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def bench_kernel(name: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    rows = request.config.getoption("--rows") or (5824 if DEVICE.type == "cuda" else 256)
    width = request.config.getoption("--width") or (3072 if DEVICE.type == "cuda" else 256)
    case = {**cases(rows, width), **attention_cases(rows, width)}[name]
    agree(case)
    given = copies(case)
    variants = {"ours": lambda: case.ours(*given()), "eager": lambda: case.plain(*given())}
    if DEVICE.type == "cuda" and not case.flops:
        compiled = torch.compile(case.plain, fullgraph=True)
        variants["torch.compile"] = lambda: compiled(*given())
    rounds = 20 if DEVICE.type == "cuda" else 3
    times = interleave(variants, rounds=rounds, device=DEVICE, warmup_s=WARMUP_S)
    bandwidth, rate = ceilings()
    seconds = times["ours"]["median_ms"] / 1e3
    share = case.flops / seconds / rate if case.flops else case.moved_bytes / seconds / bandwidth
    record = {
        "kernel": name,
        "rows": rows,
        "width": width,
        "device": DEVICE.type,
        "times": times,
        "gbs": case.moved_bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "share_of_ceiling": share,
        "ceiling_gbs": bandwidth / 1e9,
        "ceiling_tflops": rate / 1e12,
    }
    if DEVICE.type == "cuda":
        write_record("kernel", record)
    benchmark.extra_info.update(record)

    def synchronised() -> None:
        variants["ours"]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=rounds)  # type: ignore[no-untyped-call]
