"""How the layers of a LoRA are called in the key styles that are read: each is a map from its names to rows of our weights.

USO, XLabs: ``double_blocks.0.processor.qkv_lora1.down.weight``; 1 is the image stream, 2 the text stream. In a single block
``qkv_lora`` adds to the q, k and v rows of ``linear1``, ``proj_lora`` to ``linear2``. XLabs' LoRAs often have double blocks
only; none is scaled.

ComfyUI, Black Forest Labs: ``diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight``. ComfyUI's repackaged USO LoRA
adds ``linear1_qkv``, the first 3 * hidden_size rows of ``linear1``; OneTrainer numbers the parts of a fused matrix: ``qkv.0``
to ``.2`` are q, k and v, ``linear1.3`` is the feed-forward input after them.

diffusers, PEFT and most trainers: ``transformer.transformer_blocks.0.attn.to_q.lora_A.weight``. q, k, v and a single block's
feed-forward input are layers of their own there; the halves of ``norm_out.linear`` change places.

kohya: ``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight``, a path of the two styles before with underscores for dots.
OneTrainer writes ``lora_transformer_`` and SimpleTuner ``lycoris_`` before diffusers' paths; ``lora_prior_unet_`` is an older
prefix.

Source: the keys of USO's dit_lora.safetensors; attribute names in XLabs-AI/x-flux; key names in ComfyUI's comfy/lora.py and
comfy/lora_convert.py, in OneTrainer's convert_flux_lora.py, in kohya-ss/sd-scripts networks/lora_flux.py; the parameter names
of diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import diffusers_pieces, diffusers_shapes

from .layers import DOTTED_PREFIXES, KeyStyle, LayerRows, LoRALayer, layer_rows, matrices, norm_layers, whole_layer


def uso_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """The layers that USO's and XLabs' LoRAs can change, by their names there."""
    canonical = matrices(params)
    layers: dict[str, LoRALayer] = {}
    for index in range(params.depth):
        block = f"double_blocks.{index}"
        for number, stream in ((1, "img"), (2, "txt")):
            for part in ("qkv", "proj"):
                name = f"{block}.{stream}_attn.{part}"
                layers[f"{block}.processor.{part}_lora{number}"] = whole_layer(name, *canonical[name])
    for index in range(params.depth_single_blocks):
        block = f"single_blocks.{index}"
        layers[f"{block}.processor.qkv_lora"] = whole_layer(f"{block}.linear1", 3 * params.hidden_size, params.hidden_size)
        layers[f"{block}.processor.proj_lora"] = whole_layer(f"{block}.linear2", *canonical[f"{block}.linear2"])
    return layers


def uso_lora_shapes(params: TransformerParams, rank: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a USO LoRA file.

    Args:
        params: the transformer's sizes.
        rank: of every pair of matrices.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in uso_layers(params).items():
        shapes[f"{name}.down.weight"] = (rank, layer.columns)
        shapes[f"{name}.up.weight"] = (layer.rows, rank)
    return shapes


def bfl_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """Every matrix and norm by its canonical name, ``linear1_qkv`` of the single blocks, and the numbered parts."""
    width = params.hidden_size
    layers = {name: whole_layer(name, *shape) for name, shape in matrices(params).items()}
    for index in range(params.depth):
        for stream in ("img", "txt"):
            layers |= _numbered(f"double_blocks.{index}.{stream}_attn.qkv", [width] * 3, width)
    for index in range(params.depth_single_blocks):
        name = f"single_blocks.{index}.linear1"
        layers[f"{name}_qkv"] = whole_layer(name, 3 * width, width)
        layers |= _numbered(name, [width, width, width, params.mlp_width], width)
    return layers | norm_layers(params)


def _numbered(name: str, rows: list[int], columns: int) -> dict[str, LoRALayer]:
    return {f"{name}.{i}": layer_rows(name, count, columns, row=sum(rows[:i])) for i, count in enumerate(rows)}


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


def kohya_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """Every linear layer and norm by its flattened canonical name and by its flattened diffusers name."""
    return {name.replace(".", "_"): layer for name, layer in [*bfl_layers(params).items(), *diffusers_layers(params).items()]}


KEY_STYLES = (
    KeyStyle("USO / XLabs", DOTTED_PREFIXES, uso_layers),
    KeyStyle("ComfyUI / Black Forest Labs", DOTTED_PREFIXES, bfl_layers),
    KeyStyle("diffusers / PEFT", DOTTED_PREFIXES, diffusers_layers),
    KeyStyle("kohya", ("lora_transformer_", "lora_prior_unet_", "lora_unet_", "lycoris_"), kohya_layers),
)
"""Every style, in the order in which a file's keys are tried."""
