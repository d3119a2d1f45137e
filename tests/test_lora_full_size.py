"""Every layer of FLUX.1-dev is found in files of every form, by names and shapes at full size."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch

from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import diffusers_shapes
from uso_engine.weights.files.tensor_source import RecipeSource
from uso_engine.weights.lora import parse_lora
from uso_engine.weights.model_shapes import transformer_shapes

FULL = TransformerParams()


def _ones(shapes: Mapping[str, tuple[int, ...]]) -> RecipeSource:
    return RecipeSource(shapes, lambda key, shape: torch.ones(shape), dtype=torch.bfloat16, name="full size")


def _rank_one(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if len(shape) == 2:
            name = prefix + key.removesuffix(".weight")
            found |= {f"{name}.lora_A.weight": (1, shape[1]), f"{name}.lora_B.weight": (shape[0], 1)}
    return found


def _one_trainer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The canonical list with q, k, v and the feed-forward input apart."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        name, width = key.removesuffix(".weight"), FULL.hidden_size
        rows = [width] * 3 + ([FULL.mlp_width] if name.endswith("linear1") else [])
        fused = key.endswith(("attn.qkv.weight", "linear1.weight"))
        found |= {f"{name}.{i}.weight": (n, shape[1]) for i, n in enumerate(rows)} if fused else {key: shape}
    return found


@pytest.mark.parametrize("form", ["SimpleTuner", "OneTrainer", "LoKr"])
def test_every_layer_of_flux_at_full_size(form: str) -> None:
    shapes = transformer_shapes(FULL)
    matrices = {key: shape for key, shape in shapes.items() if len(shape) == 2}
    if form == "SimpleTuner":
        file = _rank_one("transformer.base_model.model.", diffusers_shapes(FULL))
    elif form == "OneTrainer":
        file = _rank_one("transformer.", _one_trainer(matrices))
    else:
        file = {}
        for key, (rows, columns) in matrices.items():
            name = "lora_prior_unet_" + key.removesuffix(".weight").replace(".", "_")
            file |= {f"{name}.lokr_w1": (8, 8), f"{name}.lokr_w2_a": (rows // 8, 1), f"{name}.lokr_w2_b": (1, columns // 8)}
    lora = parse_lora(_ones(file), FULL)
    assert set(lora.updates) == set(matrices)
    for key, updates in lora.updates.items():
        covered = sorted((update.rows.start, update.rows.stop) for update in updates)
        assert covered[0][0] == 0 and covered[-1][1] == shapes[key][0]
        assert all(a[1] == b[0] for a, b in pairwise(covered))
        assert all(update.columns == range(shapes[key][1]) for update in updates)
