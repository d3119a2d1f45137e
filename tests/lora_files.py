"""LoRAs of drawn numbers, and what they make of drawn weights, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from narrow_model import NARROW
from torch import Tensor

from uso_engine.model.params import TransformerParams
from uso_engine.weights.files.tensor_source import MemorySource
from uso_engine.weights.loading import merged_tensor
from uso_engine.weights.lora import LoRA, parse_lora
from uso_engine.weights.lora.scaling import PeftScaling
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw, recipe_source

C = NARROW.hidden_size
SHAPES = transformer_shapes(NARROW)
PROJ = "double_blocks.0.img_attn.proj"
QKV = "double_blocks.0.img_attn.qkv"
LAYER = f"diffusion_model.{PROJ}"
"""`PROJ` as ComfyUI's tools name it."""


def low_rank(layer: str, rows: int = C, columns: int = C, rank: int = 4) -> dict[str, Tensor]:
    """Down and up of a layer under kohya's endings."""
    return {
        f"{layer}.lora_down.weight": draw(f"{layer}.down", (rank, columns)),
        f"{layer}.lora_up.weight": draw(f"{layer}.up", (rows, rank)),
    }


def parsed(tensors: Mapping[str, Tensor], scaling: PeftScaling | None = None, params: TransformerParams = NARROW) -> LoRA:
    """The LoRA that a file with these tensors holds."""
    return parse_lora(MemorySource(tensors, "file"), params, scaling)


def pristine(key: str, params: TransformerParams = NARROW) -> Tensor:
    """A drawn weight, in float64."""
    return draw(key, transformer_shapes(params)[key]).double()


def assert_merges_to(
    lora: LoRA,
    expected: Mapping[str, Tensor],
    strength: float = 1.0,
    *,
    params: TransformerParams = NARROW,
    absolute: float = 2e-5,
    relative: float = 1e-5,
) -> None:
    """At a strength s every drawn weight W becomes W + s * (expected - W), and no other weight changes."""
    assert set(lora.updates) == set(expected)
    source = recipe_source(transformer_shapes(params))
    for key, value in expected.items():
        merged = merged_tensor(source, key, [(lora, strength)])
        wanted = pristine(key, params) + strength * (value - pristine(key, params))
        assert torch.allclose(merged.double(), wanted, atol=absolute, rtol=relative), key
