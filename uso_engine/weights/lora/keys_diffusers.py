"""LoRA keys that name layers as diffusers' FluxTransformer2DModel does: diffusers', PEFT's and most trainers'.

``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``. q, k, v and a single block's feed-forward input are layers of
their own there and rows of one matrix here; the halves of ``norm_out.linear`` change places.
Source: the parameter names of diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import diffusers_pieces, diffusers_shapes

from .layers import DOTTED_PREFIXES, KeyStyle, LayerRows, LoRALayer


def diffusers_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """Every linear layer and norm by diffusers' name."""
    parts: dict[str, list[LayerRows]] = {}
    for key, pieces in diffusers_pieces(params).items():
        for piece in pieces:
            parts.setdefault(piece.name, []).append(LayerRows(key, piece.rows, piece.row, piece.source_row))
    return {
        key.removesuffix(".weight"): LoRALayer(shape[0], shape[1] if len(shape) == 2 else 0, tuple(parts[key]))
        for key, shape in diffusers_shapes(params).items()
        if key.endswith(".weight")
    }


STYLE = KeyStyle("diffusers / PEFT", DOTTED_PREFIXES, diffusers_layers)
