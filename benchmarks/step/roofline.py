"""FLOPs and bytes of every operation of a denoising step, the least time a GPU could need for them, and the memory they take.

    python -m benchmarks.step.roofline [--text 512] [--style 192] [--image 4096] [--content 1024]

Counts what the engine computes: content and text come embedded, modulation is a table, and the last single block computes
queries, MLP and output for the image rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.arguments import BenchmarkParser, count
from uso_engine.model.params import TransformerParams
from uso_engine.offload.sizes import transformer_sizes
from uso_engine.precision.tiers import TIERS, TierName
from uso_engine.precision.transformer import DTYPES, layer_formats

BF16 = 2


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sequence: T5 tokens, style tokens, image tokens, content tokens."""

    text: int = 512
    style: int = 0
    image: int = 4096
    content: int = 0

    @property
    def all(self) -> int:
        """L."""
        return self.text + self.style + self.image + self.content


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

    def floor_ms(self, gpu: GPU, *, gemm_speedup: float = 1.0) -> float:
        """The least milliseconds: its arithmetic at the best rate on record or its bytes at the memory's bandwidth."""
        rates = {"gemm": gpu.gemm_rate * gemm_speedup, "attention": gpu.attention_rate}
        by_memory = self.bytes / (gpu.bandwidth_gbs * 1e9)
        rate = rates.get(self.kind)
        return 1e3 * (by_memory if rate is None else max(by_memory, self.flops / rate))


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
    yield _attention("double attention", everything, everything, width, depth)
    yield _elementwise("merge and first norm", everything * width, 8, 4)
    yield _gemm("single linear1 qkv", everything, 3 * width, width, singles - 1)
    yield _gemm("single linear1 mlp", everything, mlp, width, singles - 1)
    yield _gemm("single linear2 attention", everything, width, width, singles - 1)
    yield _gemm("single linear2 mlp", everything, width, mlp, singles - 1)
    # The second product reads what the first one wrote.
    yield _elementwise("single sum of both outputs", everything * width, 1, 1, singles - 1)
    yield _elementwise("single gated residual, LayerNorm, modulation", everything * width, 12, 4, singles - 1)
    yield _elementwise("single q/k norm, rotation", 2 * everything * width, 9, 2, singles)
    yield _attention("single attention", everything, everything, width, singles - 1)
    yield _gemm("last single qkv", everything, 3 * width, width)
    yield _gemm("last single mlp", image, mlp, width)
    yield _gemm("last single linear2", image, width, width + mlp)
    yield _attention("last single attention", image, everything, width, 1)
    yield _elementwise("last single rows, gated residual, LayerNorm", image * width, 12, 10)
    yield _gemm("final linear", image, params.in_channels, width)
    yield _elementwise("Euler step", image * params.in_channels, 2, 6)


def step_flops(params: TransformerParams, tokens: Tokens) -> float:
    """FLOPs of matrix products and attention of one step."""
    return sum(o.flops for o in step_operations(params, tokens) if o.kind != "elementwise")


def floor_ms(params: TransformerParams, tokens: Tokens, gpu: GPU, *, fp8: bool = False) -> dict[str, float]:
    """The least time of a step, by kind of operation, in milliseconds.

    Matrix products and attention at the best rates on record (fp8 products 1.8 times bf16's, as FACTS measured), elementwise
    operations at the memory's bandwidth. "floor" counts the first two alone: it could be reached only with every
    elementwise operation inside a product or attention. "separate kernels" adds elementwise kernels, fused as they are here.
    """
    sums = {"gemm": 0.0, "attention": 0.0, "elementwise": 0.0}
    for operation in step_operations(params, tokens):
        sums[operation.kind] += operation.floor_ms(gpu, gemm_speedup=1.8 if fp8 else 1.0)
    floor = sums["gemm"] + sums["attention"]
    return {**sums, "floor": floor, "separate kernels": floor + sums["elementwise"]}


def weight_count(params: TransformerParams) -> dict[str, int]:
    """Numbers in the transformer: those of modulation linears, and all others."""
    width, mlp = params.hidden_size, params.mlp_width
    qkv_bias = 3 * width if params.qkv_bias else 0
    stream = 3 * width**2 + qkv_bias + width**2 + width + 2 * width * mlp + mlp + width + 2 * params.head_dim
    single = width * (3 * width + mlp) + 3 * width + mlp + (width + mlp) * width + width + 2 * params.head_dim
    embedders = (256 + params.vec_in_dim + (256 if params.guidance_embed else 0)) * width
    embedders += (3 if params.guidance_embed else 2) * (width**2 + 2 * width)
    ends = 2 * params.in_channels * width + width + params.in_channels + params.context_in_dim * width + width
    vectors = 12 * params.depth + 3 * params.depth_single_blocks + 2
    return {
        "modulation": vectors * (width**2 + width),
        "rest": 2 * params.depth * stream + params.depth_single_blocks * single + embedders + ends,
    }


def memory_bytes(
    params: TransformerParams,
    tokens: Tokens,
    *,
    tier: TierName = "bf16",
    steps: int = 28,
    keeps_modulation: bool = True,
    reads_floats: bool = True,
) -> dict[str, float]:
    """Memory of the transformer during denoising, as docs/performance.md writes it out.

    Args:
        params: the model's sizes.
        tokens: of one sequence.
        tier: of the weights; in float32 activations take twice what is said here.
        steps: rows of the modulation table.
        keeps_modulation: whether the modulation linears stay on the GPU.
        reads_floats: whether products read floats, not 8-bit rows.
    """
    sizes = transformer_sizes(params, layer_formats(params, tier), dtype=DTYPES[TIERS[tier].dtype])
    width, mlp = params.hidden_size, params.mlp_width
    if reads_floats:
        # In a double block's MLP, of the image stream: x, its normed form, attention's result, its sum with x, the hidden layer
        # and what the second product gives; of the text stream x, its normed form and attention's result. Or in a single block:
        # x, its normed form, the projection of q, k and v, q, k and attention's result.
        double = (5 * width + mlp) * (tokens.image + tokens.content) + 3 * width * (tokens.text + tokens.style)
        activations = float(max(double, 8 * width * tokens.all))
    else:
        # In the second product: x, its normed form in 8 bits, the first product, attention's result, both beside each other in
        # 8 bits, and what they give.
        activations = (1.5 * width + (3 * width + mlp) + width + 0.5 * (width + mlp) + width) * tokens.all
    vectors = 12 * params.depth + 3 * params.depth_single_blocks + 2
    return {
        "weights": float(sizes.total if keeps_modulation else sizes.without_modulation),
        "modulation_table": float(BF16 * steps * vectors * width),
        "activations": float(BF16 * activations),
        "rotary": float(2 * 4 * tokens.all * params.head_dim // 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__)
    for name, default in (("text", 512), ("style", 192), ("image", 4096), ("content", 1024)):
        parser.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{name} tokens; by default {default}")
    tokens = replace(Tokens(), **vars(parser.read(arguments)))
    params = TransformerParams()
    print(f"L = {tokens.all}: {step_flops(params, tokens) / 1e12:.1f} TFLOP per step")
    for operation in step_operations(params, tokens):
        print(f"  {operation.name:48s} {operation.flops / 1e12:8.3f} TFLOP {operation.bytes / 1e9:8.2f} GB")
    for name, gpu in GPUS.items():
        bf16, fp8 = (floor_ms(params, tokens, gpu, fp8=flag) for flag in (False, True))
        parts = f"{bf16['separate kernels']:.1f} with elementwise kernels"
        print(f"{name:9s} bf16 {bf16['floor']:6.1f} ms ({parts}), fp8 {fp8['floor']:6.1f} ms")
    memory = memory_bytes(params, tokens)
    print("memory in bf16: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items()))


if __name__ == "__main__":
    main()
