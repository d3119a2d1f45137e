"""FLOPs and bytes of every operation of a denoising step, the least time a GPU could need for them, and the memory they take.

    python -m benchmarks.step.roofline [--text 512] [--style 192] [--image 4096] [--content 1024]

The counts are `uso_engine/model/roofline.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.arguments import BenchmarkParser, count
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import BF16, GPUS, Tokens, floor_ms, step_flops, step_operations
from uso_engine.offload.sizes import transformer_sizes
from uso_engine.precision.tiers import TIERS, TierName
from uso_engine.precision.transformer import DTYPES, layer_formats


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
