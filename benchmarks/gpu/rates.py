"""What this card does with each product, each attention and a copy, at the model's sizes and alone: ceilings for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from uso_kernels.attention import attention
from uso_kernels.matmul.fp8 import scaled_matmul
from uso_kernels.matmul.int8 import int8_matmul
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged

from .bench import Bench


def run(bench: Bench) -> None:
    bench.attempt("ceilings", lambda: ceilings(bench))
    bench.attempt("products, TFLOP/s", lambda: products(bench))
    bench.attempt("attention, TFLOP/s", lambda: attentions(bench))
    bench.record("rates", bench.results)


def normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype)


def rate(bench: Bench, operations: float, compute: Callable[[], object]) -> object:
    """TFLOP/s (or TB/s) of one call among several queued, by the median; what went wrong where it did."""
    return bench.tried(lambda: operations / bench.median_ms(compute, at_once_ms=3) / 1e9)


def ceilings(bench: Bench) -> dict[str, object]:
    """A copy larger than every cache, and a large square product."""
    source = normal(bench, 2**28 if bench.on_gpu else 2**16)
    target, n = torch.empty_like(source), 8192 if bench.on_gpu else 64
    a, b = normal(bench, n, n), normal(bench, n, n)
    return {
        "copy, TB/s": rate(bench, 4 * source.numel(), lambda: target.copy_(source)),
        f"{n}^3 product, TFLOP/s": rate(bench, 2 * n**3, lambda: a @ b),
    }


def shapes(bench: Bench) -> dict[str, tuple[int, int, int]]:
    """M, N, K of the products of a step, and of single blocks whose two matrices are split into their parts."""
    tokens, params = bench.tokens, bench.workload.params
    width, mlp = params.hidden_size, params.mlp_width
    text, image, everything = tokens.text + tokens.style, tokens.image + tokens.content, tokens.all
    double = {
        f"{stream} {name}": (rows, columns, inner)
        for stream, rows in (("image", image), ("text", text))
        for name, columns, inner in (
            ("qkv", 3 * width, width),
            ("proj", width, width),
            ("mlp.0", mlp, width),
            ("mlp.2", width, mlp),
        )
    }
    single = {"linear1": (everything, 3 * width + mlp, width), "linear2": (everything, width, width + mlp)}
    parts = {"linear1 qkv": (3 * width, width), "linear1 mlp": (mlp, width)}
    parts |= {"linear2 attention": (width, width), "linear2 mlp": (width, mlp)}
    return {**single, **{name: (everything, *shape) for name, shape in parts.items()}, **double}


def products(bench: Bench) -> dict[str, dict[str, object]]:
    return {f"{name} {m}x{n}x{k}": product(bench, m, n, k) for name, (m, n, k) in shapes(bench).items()}


def product(bench: Bench, m: int, n: int, k: int) -> dict[str, object]:
    """One product in bfloat16, with GELU in its epilogue, in fp8 and in int8 on operands that are quantised already."""
    x, weight, bias = normal(bench, m, k), normal(bench, n, k), normal(bench, n)
    y, rows = torch.empty(m, n, device=bench.device, dtype=bench.dtype), {}
    ways: dict[str, Callable[[], object]] = {
        "bf16": lambda: torch.addmm(bias, x, weight.t(), out=y),
        "gelu": lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=y),
    }
    for name, dtype, multiply in (("fp8", torch.float8_e4m3fn, scaled_matmul), ("int8", torch.int8, int8_matmul)):
        rows[name] = (*quantize_rows(x, dtype), *quantize_rows(weight, dtype))
        ways[name] = lambda name=name, multiply=multiply: multiply(*rows[name], bias)  # type: ignore[misc]
    return {name: rate(bench, 2 * m * n * k, compute) for name, compute in ways.items()}


def attentions(bench: Bench) -> dict[str, object]:
    """Every backend that runs here, also with values where the projection writes them; torch's own calls beside them."""
    length, params = bench.tokens.all, bench.workload.params
    heads, width = params.num_heads, params.hidden_size
    q, k, v = (normal(bench, length, heads, params.head_dim) for _ in range(3))
    layout, flops = Ragged.pack([length], bench.device), 4.0 * length**2 * width
    found: dict[str, object] = {}

    projected = normal(bench, length, 3 * width)[:, 2 * width :].unflatten(1, (heads, -1))

    def backend(name: str, values: Tensor) -> Callable[[], object]:
        return lambda: attention(q, k, values, layout, layout, backend=name)

    for name, reason in bench.backends().items():
        if reason is None:
            ways = {"values apart": backend(name, v), "values in place": backend(name, projected)}
            found[name] = {way: rate(bench, flops, compute) for way, compute in ways.items()}
        else:
            found[name] = reason[:80]
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def torchs_own() -> Tensor:
        return F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])

    for choice in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if bench.on_gpu else (SDPBackend.MATH,):
        with sdpa_kernel(choice):
            found[f"torch {choice.name}"] = rate(bench, flops, torchs_own)
    return {**found, "torch's own choice": rate(bench, flops, torchs_own)}
