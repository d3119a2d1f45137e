"""Each kernel against plain PyTorch and `torch.compile`, with the share of a ceiling measured in the same run.

    python -m pytest benchmarks/kernels/bench_kernels.py -o python_files='bench_*.py' -o python_functions='bench_*'

What is timed are the modules' own examples, those that a step makes, and every attention backend. On a GPU every call works on
the next of several copies of its operands, together larger than the L2 cache. The result is compared with the reference before
it is timed. On a CPU the operations are their references: a smoke test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.kernels.eight_bit_rounding import rounding_of_attention
from benchmarks.measure import interleave, write_record
from uso_kernels.attention import BACKENDS, attention, available_backends
from uso_kernels.example import Size, all_examples
from uso_kernels.launch import Generation, generation_of
from uso_kernels.ragged import Ragged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GENERATION: Generation = generation_of(torch.empty(1, device=DEVICE)) if DEVICE.type == "cuda" else "hopper"
L2_BYTES = 128 * 2**20
TOLERANCE = 0.03
"""Relative difference of what rounds to the same types in another order; of 8-bit rows a few fall on a neighbouring number."""
WARMUP_S = 0.2 if DEVICE.type == "cuda" else 0.0


class Case(NamedTuple):
    """What is timed: ours, plain PyTorch, what both take, positions of what they fill, FLOPs (0: it is bound by memory).

    Without positions, what they return is compared. `rounding` tells from the operands what relative error is probable where
    the two round otherwise by design; without it they may differ by `TOLERANCE`.
    """

    ours: Callable[..., object]
    plain: Callable[..., object]
    operands: tuple[object, ...]
    writes: tuple[int, ...]
    flops: int
    rounding: Callable[[Tensor, Tensor, Tensor], float] | None = None

    @property
    def moved_bytes(self) -> int:
        """Bytes that must be moved: every operand once."""
        return sum(operand.nbytes for operand in self.operands if isinstance(operand, Tensor))

    def copy(self) -> tuple[object, ...]:
        """The same operands in memory of their own."""
        return tuple(operand.clone() if isinstance(operand, Tensor) else operand for operand in self.operands)


def cases(rows: int, width: int) -> dict[str, Case]:
    """Every kernel at T = rows and C = width."""
    size = Size(rows, width, device=DEVICE)
    found = {
        example.name: Case(
            example.operation, example.operation.reference, example.operands, example.operation.writes, example.flops
        )
        for example in all_examples(GENERATION, size)
        if example.is_hot
    }
    return {**found, **dict(attention_cases(size))}


def attention_cases(size: Size) -> Iterator[tuple[str, Case]]:
    """Every other attention backend that runs here, one long sequence."""
    layout, heads = Ragged.pack([size.rows], DEVICE), size.width // 128
    q, k, v = size.normal(3, size.rows, heads, 128)
    operands = (q, k, v, layout, layout)
    plain = partial(attention, backend="dense")
    for name, reason in available_backends(DEVICE).items():
        if reason is None and name != "triton":
            attend = partial(attention, backend=name)
            flops, rounding = 4 * size.rows * size.rows * size.width, rounding_of_attention if BACKENDS[name].loss else None
            yield f"attention {name}", Case(attend, plain, operands, (), flops, rounding)


NAMES = list(cases(64, 128))


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
    given = cycle([case.copy() for _ in range(count)])
    return lambda: next(given)


def agree(case: Case) -> None:
    """Compare with the reference; a kernel that is wrong is not timed.

    What rounds otherwise by design may be off twice as far as is probable.

    Raises:
        AssertionError: it is wrong; also where assertions are switched off.
    """
    allowed = TOLERANCE if case.rounding is None else 2 * case.rounding(*case.operands[:3])  # type: ignore[arg-type]
    results, expected = case.copy(), case.copy()
    returned = case.ours(*results), case.plain(*expected)
    for result, plain in [(results[position], expected[position]) for position in case.writes] or [returned]:
        if isinstance(result, Tensor) and isinstance(plain, Tensor):
            error = float((result.float() - plain.float()).norm() / plain.float().norm().clamp(min=1e-30))
            if not error <= allowed:
                raise AssertionError(f"relative error {error:.2g} where {allowed:.2g} is allowed")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def bench_kernel(name: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    rows = request.config.getoption("--rows") or (5824 if DEVICE.type == "cuda" else 256)
    width = request.config.getoption("--width") or (3072 if DEVICE.type == "cuda" else 256)
    case = cases(rows, width)[name]
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
