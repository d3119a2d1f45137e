"""USO's own LoRA keys, and XLabs', from whose code they come.

``double_blocks.0.processor.qkv_lora1.down.weight``: 1 is the image stream, 2 the text stream. In a single block ``qkv_lora``
adds to the q, k and v rows of ``linear1``, ``proj_lora`` to ``linear2``. XLabs' LoRAs often have double blocks only; none is
scaled.
Source: the keys of USO's dit_lora.safetensors; attribute names of the attention processors in XLabs-AI/x-flux.
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams

from .layers import DOTTED_PREFIXES, KeyStyle, LoRALayer, matrices, whole_layer


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


STYLE = KeyStyle("USO / XLabs", DOTTED_PREFIXES, uso_layers)
