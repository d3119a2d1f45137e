"""kohya's LoRA keys: the layer's path with underscores for dots.

``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` and ``.alpha``; OneTrainer writes ``lora_transformer_`` and
SimpleTuner ``lycoris_`` before diffusers' paths; ``lora_prior_unet_`` is an older prefix for the same paths.
Source: key names in kohya-ss/sd-scripts networks/lora_flux.py, and in ComfyUI's comfy/lora.py for the other two trainers.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams

from .keys_bfl import bfl_layers
from .keys_diffusers import diffusers_layers
from .layers import KeyStyle, LoRALayer


def kohya_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """Every linear layer and norm by its flattened canonical name and by its flattened diffusers name."""
    return {name.replace(".", "_"): layer for name, layer in [*bfl_layers(params).items(), *diffusers_layers(params).items()]}


STYLE = KeyStyle("kohya", ("lora_transformer_", "lora_prior_unet_", "lora_unet_", "lycoris_"), kohya_layers)
