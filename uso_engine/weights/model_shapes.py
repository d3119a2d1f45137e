"""Keys and shapes of the weights that a model has: the model's own, read off it on the meta device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer

Shapes = dict[str, tuple[int, ...]]


def module_shapes(module: nn.Module) -> Shapes:
    """Shape of every tensor of a module's state by key, in the module's order."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def transformer_shapes(params: TransformerParams) -> Shapes:
    """Shape of every weight of a transformer by canonical key, which is the one in Black Forest Labs' checkpoints.

    Args:
        params: the transformer's sizes.

    Returns:
        780 entries for FLUX.1-dev, 776 for schnell, which has no guidance embedding.
    """
    return dict(_transformer_shapes(params))


@lru_cache(maxsize=8)
def _transformer_shapes(params: TransformerParams) -> Shapes:
    # A full-size model has hundreds of modules, and a LoRA's key styles ask for its shapes several times.
    with torch.device("meta"):
        return module_shapes(Transformer(params))
