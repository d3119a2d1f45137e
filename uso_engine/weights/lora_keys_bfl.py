"""LoRA keys that name layers as Black Forest Labs' checkpoints do: ComfyUI's, and PEFT's on that model.

``diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight``. ComfyUI's repackaged USO LoRA adds ``linear1_qkv``, the first
3 * hidden_size rows of ``linear1``.
Source: key names in ComfyUI's comfy/lora.py and comfy/lora_convert.py.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams
from uso_engine.weights.lora_layers import DOTTED_PREFIXES, KeyStyle, LoRALayer, matrices, whole_layer


def bfl_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """Every matrix by its canonical name, and ``linear1_qkv`` of the single blocks."""
    layers = {name: whole_layer(name, *shape) for name, shape in matrices(params).items()}
    for index in range(params.depth_single_blocks):
        name = f"single_blocks.{index}.linear1"
        layers[f"{name}_qkv"] = whole_layer(name, 3 * params.hidden_size, params.hidden_size)
    return layers


STYLE = KeyStyle("ComfyUI / Black Forest Labs", DOTTED_PREFIXES, bfl_layers)
