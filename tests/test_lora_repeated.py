"""One change in two places: in two key styles of a file, or in several files."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from lora_files import LAYER, PROJ, QKV, SHAPES, C, low_rank, parsed, pristine
from torch import Tensor

from uso_engine.errors import LoRAError
from uso_engine.weights.loading import merged_tensor
from uso_engine.weights.recipe import draw, recipe_source


def _twice(scale: float) -> dict[str, Tensor]:
    """One LoRA under kohya's fused names, and under PEFT's, whose up matrices have the scale in them."""
    tensors: dict[str, Tensor] = {}
    rank, flat = 3, "lora_unet_" + QKV.replace(".", "_")
    ups = [draw(f"{part}.up", (C, rank)) for part in "qkv"]
    downs = [draw(f"{part}.down", (rank, C)) for part in "qkv"]
    for part, down, up in zip("qkv", downs, ups, strict=True):
        layer = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": (up * scale).bfloat16()}
    tensors |= {f"{flat}.lora_down.weight": torch.cat(downs), f"{flat}.lora_up.weight": torch.block_diag(*ups)}
    return tensors | {f"{flat}.alpha": torch.tensor(scale * 3 * rank)}


def test_a_lora_under_two_key_styles_is_taken_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        lora = parsed(_twice(0.6))
    assert "taken once" in caplog.text
    expected = pristine(f"{QKV}.weight")
    for index, part in enumerate("qkv"):
        up = (draw(f"{part}.up", (C, 3)) * 0.6).bfloat16().double()
        expected[index * C : (index + 1) * C] += up @ draw(f"{part}.down", (3, C)).double()
    merged = merged_tensor(recipe_source(SHAPES), f"{QKV}.weight", [(lora, 1.0)])
    assert torch.allclose(merged.double(), expected, atol=2e-5)
    assert set(lora.updates) == {f"{QKV}.weight"}
    assert lora.style == "diffusers / PEFT"


def test_two_loras_under_two_key_styles_are_refused() -> None:
    different = _twice(0.6)
    different["transformer.transformer_blocks.0.attn.to_v.lora_B.weight"] *= 1.05
    with pytest.raises(LoRAError, match=rf"the same rows of {QKV}.weight as .*, in another key style and with other values"):
        parsed(different)
    partly = {key: value for key, value in _twice(0.6).items() if ".to_v." not in key}
    with pytest.raises(LoRAError, match="in another key style"):
        parsed(partly)


def test_files_add_up_to_the_same_bits_in_any_order() -> None:
    dora = low_rank(LAYER) | {f"{LAYER}.dora_scale": torch.ones(C, 1)}
    flat = "lora_unet_" + PROJ.replace(".", "_")
    loras = [
        (parsed(low_rank(LAYER)), 0.3),
        (parsed(low_rank(LAYER)), 0.7),  # the same update again
        (parsed({f"{flat}.diff": draw("d", (C, C))}), -1.7),
        (parsed(dora), 0.9),
    ]
    key = f"{PROJ}.weight"
    merged = [merged_tensor(recipe_source(SHAPES), key, list(order)) for order in permutations(loras)]
    assert all(torch.equal(one, merged[0]) for one in merged)
    strengths = [
        merged_tensor(recipe_source(SHAPES), key, [(loras[0][0], a), (loras[1][0], b)]) for a, b in ((3, 0.1), (0.1, 3))
    ]
    assert torch.equal(*strengths)
