"""T5 with its matrices in 8 bits: 4.9 GB instead of 9.5 for T5-XXL. Weight-only, so a prompt's error is that of the weights."""

from __future__ import annotations

import torch
from torch import nn

from uso_engine.errors import CheckpointError

from .finite import is_finite
from .quantized_linear import QuantizedLinear
from .tiers import TIERS, Format, TextTierName, linear_classes

_FORMATS: dict[str, Format] = {
    name: tier.text_encoder for name, tier in TIERS.items() if tier.text_encoder not in (None, "float")
}


@torch.no_grad()
def quantize_text_encoder(encoder: nn.Module, precision: TextTierName) -> nn.Module:
    """Replace every linear layer of a transformers text encoder, one at a time and in place; embeddings and norms stay.

    Args:
        encoder: a loaded `T5EncoderModel`.
        precision: int8 (the smaller error: 0.9 % per matrix) or fp8 (2.6 %, needs no optimum-quanto).

    Returns:
        The same module.

    Raises:
        ValueError: another precision, or a module without linear layers.
        CheckpointError: weights that are infinite or not a number; the module is as it was.
        BackendError: int8 without optimum-quanto; the module is as it was.
    """
    if precision not in _FORMATS:
        raise ValueError(f"a text encoder can be kept in {' or '.join(_FORMATS)}, got {precision!r}")
    layers = {name: layer for name, layer in encoder.named_modules() if type(layer) is nn.Linear}
    if not layers:
        raise ValueError(f"{type(encoder).__name__} has no linear layers to quantise, or has them quantised already")
    broken = [name for name, layer in layers.items() if not is_finite(layer.weight)]
    if broken:
        raise CheckpointError(f"{len(broken)} matrices hold values that are infinite or not a number: {', '.join(broken[:5])}")
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, _quantized(layer, linear_classes()[_FORMATS[precision]]))
    return encoder


def _quantized(layer: nn.Linear, layer_class: type[QuantizedLinear]) -> QuantizedLinear:
    weight, bias = layer.weight, layer.bias
    replacement = layer_class(layer.in_features, layer.out_features, bias=bias is not None, dtype=weight.dtype, device="meta")
    tensors = layer_class.quantize_weight(weight.float())
    replacement.assign(tensors if bias is None else {**tensors, "bias": bias.detach()})
    return replacement.eval()
