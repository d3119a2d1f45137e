"""Names and shapes of the transformer's weights as Black Forest Labs' checkpoints have them: the engine's canonical keys."""

from __future__ import annotations

from uso_engine.model.params import TransformerParams

_FREQUENCIES = 256
"""Width of the sinusoidal embedding of time and guidance (FLUX.1)."""


def transformer_shapes(params: TransformerParams) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a transformer by canonical key.

    Args:
        params: the transformer's sizes.

    Returns:
        780 entries for FLUX.1-dev, 776 for schnell, which has no guidance embedding.
    """
    width = params.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def embedder(name: str, columns: int) -> None:
        linear(f"{name}.in_layer", width, columns)
        linear(f"{name}.out_layer", width, width)

    def norms(name: str) -> None:
        shapes[f"{name}.query_norm.scale"] = (params.head_dim,)
        shapes[f"{name}.key_norm.scale"] = (params.head_dim,)

    linear("img_in", width, params.in_channels)
    embedder("time_in", _FREQUENCIES)
    embedder("vector_in", params.vec_in_dim)
    if params.guidance_embed:
        embedder("guidance_in", _FREQUENCIES)
    linear("txt_in", width, params.context_in_dim)
    for index in range(params.depth):
        for stream in (f"double_blocks.{index}.img", f"double_blocks.{index}.txt"):
            linear(f"{stream}_mod.lin", 6 * width, width)
            linear(f"{stream}_attn.qkv", 3 * width, width, bias=params.qkv_bias)
            norms(f"{stream}_attn.norm")
            linear(f"{stream}_attn.proj", width, width)
            linear(f"{stream}_mlp.0", params.mlp_width, width)
            linear(f"{stream}_mlp.2", width, params.mlp_width)
    for index in range(params.depth_single_blocks):
        block = f"single_blocks.{index}"
        linear(f"{block}.linear1", 3 * width + params.mlp_width, width)
        linear(f"{block}.linear2", width, width + params.mlp_width)
        norms(f"{block}.norm")
        linear(f"{block}.modulation.lin", 3 * width, width)
    linear("final_layer.linear", params.in_channels, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes
