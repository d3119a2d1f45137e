"""LoRA keys that name layers as Black Forest Labs' checkpoints do: ComfyUI's, and PEFT's on that model.

``diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight``. ComfyUI's repackaged USO LoRA adds ``linear1_qkv``, the first
3 * hidden_size rows of ``linear1``. OneTrainer numbers the parts of a fused matrix: ``qkv.0`` to ``.2`` are q, k and v, and
``linear1.3`` is the feed-forward input after them.
Source: key names in ComfyUI's comfy/lora.py and comfy/lora_convert.py, and in OneTrainer's convert_flux_lora.py.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams

from .layers import DOTTED_PREFIXES, KeyStyle, LoRALayer, layer_rows, matrices, norm_layers, whole_layer


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


STYLE = KeyStyle("ComfyUI / Black Forest Labs", DOTTED_PREFIXES, bfl_layers)
