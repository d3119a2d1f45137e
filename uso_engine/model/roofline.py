"""FLOPs and bytes of every operation of a denoising step, and the least time that a device could need for them.

Counts what the engine computes: content and text come embedded, modulation is a table, and the last single block computes
queries, MLP and output for the image rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from uso_engine.model.params import TransformerParams

BF16 = 2


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sequence: T5's, style's, the image's, content's; and the keys that text rows have beyond one each."""

    text: int = 512
    style: int = 0
    image: int = 4096
    content: int = 0
    copies: int = 0

    @property
    def all(self) -> int:
        """L."""
        return self.text + self.style + self.image + self.content

    @property
    def keys(self) -> int:
        """Keys that every query attends to."""
        return self.all + self.copies


@dataclass(frozen=True)
class Operation:
    """One kernel or matrix product of a step, all its repetitions together.

    Args:
        name: which.
        kind: "gemm", "attention" or "elementwise".
        flops: multiplications and additions.
        bytes: read and written, each operand once, in bfloat16.
    """

    name: str
    kind: str
    flops: float
    bytes: float

    def floor_ms(self, rates: Rates, *, gemm_speedup: float = 1.0) -> float:
        """The least milliseconds: its arithmetic at the best rate known or its bytes at the memory's bandwidth."""
        by_kind = {"gemm": rates.gemm_rate * gemm_speedup, "attention": rates.attention_rate}
        by_memory = self.bytes / (rates.bandwidth_gbs * 1e9)
        rate = by_kind.get(self.kind)
        return 1e3 * (by_memory if rate is None else max(by_memory, self.flops / rate))


class Rates(Protocol):
    """The best rates known of a device: FLOP/s of a good matrix product and a good attention, 10^9 bytes/s of its memory."""

    @property
    def gemm_rate(self) -> float: ...

    @property
    def attention_rate(self) -> float: ...

    @property
    def bandwidth_gbs(self) -> float: ...

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class GPU:
    """What a GPU can do; rates are dense, with float32 accumulation, in TFLOP/s.

    Args:
        bf16_tflops: tensor cores, by the data sheet.
        fp8_tflops: likewise.
        bandwidth_gbs: memory, 10^9 bytes per second.
        memory_gb: 10^9 bytes.
        source: of these numbers.
        gemm_tflops: the best bf16 matrix product on record, None: 0.8 of the data sheet.
        attention_tflops: the best bf16 attention on record, None: 0.65 of the data sheet.
    """

    bf16_tflops: float
    fp8_tflops: float
    bandwidth_gbs: float
    memory_gb: float
    source: str
    gemm_tflops: float | None = None
    attention_tflops: float | None = None

    @property
    def gemm_rate(self) -> float:
        """FLOP/s of a good bf16 matrix product."""
        return 1e12 * (self.gemm_tflops or 0.8 * self.bf16_tflops)

    @property
    def attention_rate(self) -> float:
        """FLOP/s of a good bf16 attention."""
        return 1e12 * (self.attention_tflops or 0.65 * self.bf16_tflops)


# 790 and 650 are the best rates published for Hopper (FlashAttention-3 and cuDNN assets, FBGEMM issue 2766).
GPUS = {
    "H200": GPU(989.4, 1978.9, 4800, 141, "NVIDIA H200 data sheet", 790, 650),
    "H100": GPU(989.4, 1978.9, 3350, 80, "NVIDIA H100 SXM data sheet", 790, 650),
    "B200": GPU(2250, 4500, 8000, 180, "NVIDIA DGX B200 data sheet, an eighth"),
    "RTX 4090": GPU(165.2, 330.3, 1008, 24, "NVIDIA Ada GPU architecture white paper, table of appendix A"),
    "RTX 5090": GPU(209.5, 419.0, 1792, 32, "NVIDIA RTX Blackwell GPU architecture white paper, appendix A"),
}


def _gemm(name: str, rows: float, columns: int, inner: int, times: int = 1) -> Operation:
    size = rows * inner + columns * inner + rows * columns
    return Operation(name, "gemm", 2.0 * rows * columns * inner * times, float(BF16 * size * times))


def _elementwise(name: str, elements: float, flops_per_element: float, moved: float, times: int = 1) -> Operation:
    """`moved` elements read or written per element computed."""
    return Operation(name, "elementwise", elements * flops_per_element * times, BF16 * elements * moved * times)


def _attention(name: str, queries: float, keys: float, width: int, times: int) -> Operation:
    return Operation(name, "attention", 4.0 * queries * keys * width * times, BF16 * width * 2 * (queries + keys) * times)


def step_operations(params: TransformerParams, tokens: Tokens) -> Iterator[Operation]:
    """Every operation of one step where products read floats: GELU is part of products, and values stay where they are."""
    width, mlp, depth, singles = params.hidden_size, params.mlp_width, params.depth, params.depth_single_blocks
    everything, image = tokens.all, tokens.image
    text_rows, image_rows = tokens.text + tokens.style, tokens.image + tokens.content
    yield _gemm("img_in", image, width, params.in_channels)
    for stream, rows in (("text", text_rows), ("image", image_rows)):
        yield _gemm(f"double {stream} qkv", rows, 3 * width, width, depth)
        yield _gemm(f"double {stream} proj", rows, width, width, depth)
        yield _gemm(f"double {stream} mlp.0", rows, mlp, width, depth)
        yield _gemm(f"double {stream} mlp.2", rows, width, mlp, depth)
    yield _elementwise("double gated residual, LayerNorm, modulation", everything * width, 12, 4, 2 * depth)
    yield _elementwise("double q/k norm, rotation, scatter", 2 * everything * width, 9, 2, depth)
    yield _attention("double attention", everything, tokens.keys, width, depth)
    yield _elementwise("merge and first norm", everything * width, 8, 4)
    yield _gemm("single linear1 qkv", everything, 3 * width, width, singles - 1)
    yield _gemm("single linear1 mlp", everything, mlp, width, singles - 1)
    yield _gemm("single linear2 attention", everything, width, width, singles - 1)
    yield _gemm("single linear2 mlp", everything, width, mlp, singles - 1)
    # The second product reads what the first one wrote.
    yield _elementwise("single sum of both outputs", everything * width, 1, 1, singles - 1)
    yield _elementwise("single gated residual, LayerNorm, modulation", everything * width, 12, 4, singles - 1)
    yield _elementwise("single q/k norm, rotation", 2 * everything * width, 9, 2, singles)
    yield _attention("single attention", everything, tokens.keys, width, singles - 1)
    yield _gemm("last single qkv", everything, 3 * width, width)
    yield _gemm("last single mlp", image, mlp, width)
    yield _gemm("last single linear2", image, width, width + mlp)
    yield _attention("last single attention", image, tokens.keys, width, 1)
    if tokens.copies:
        yield _elementwise("keys and values with copies", 2 * tokens.keys * width, 0, 2, depth + singles)
    yield _elementwise("last single rows, gated residual, LayerNorm", image * width, 12, 10)
    yield _gemm("final linear", image, params.in_channels, width)
    yield _elementwise("Euler step", image * params.in_channels, 2, 6)


def step_flops(params: TransformerParams, tokens: Tokens) -> float:
    """FLOPs of matrix products and attention of one step."""
    return sum(o.flops for o in step_operations(params, tokens) if o.kind != "elementwise")


def floor_ms(params: TransformerParams, tokens: Tokens, rates: Rates, *, fp8: bool = False) -> dict[str, float]:
    """The least time of a step, by kind of operation, in milliseconds.

    Matrix products and attention at the best rates on record (fp8 products 1.8 times bf16's, as FACTS measured), elementwise
    operations at the memory's bandwidth. "floor" counts the first two alone: it could be reached only with every
    elementwise operation inside a product or attention. "separate kernels" adds elementwise kernels, fused as they are here.
    """
    sums = {"gemm": 0.0, "attention": 0.0, "elementwise": 0.0}
    for operation in step_operations(params, tokens):
        sums[operation.kind] += operation.floor_ms(rates, gemm_speedup=1.8 if fp8 else 1.0)
    floor = sums["gemm"] + sums["attention"]
    return {**sums, "floor": floor, "separate kernels": floor + sums["elementwise"]}
