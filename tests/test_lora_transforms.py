"""IA3, OFT and GLoRA against their formulas, computed apart in float64 from the tensors as the file has them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from lora_files import LAYER, PROJ, QKV, SHAPES, C, assert_merges_to, low_rank, parsed, pristine
from torch import Tensor

from uso_engine.errors import LoRAError
from uso_engine.weights.loading import merged_tensor
from uso_engine.weights.recipe import draw, recipe_source

WEIGHT = f"{PROJ}.weight"
HALVES, SWAPPED = "transformer.norm_out.linear", "final_layer.adaLN_modulation.1.weight"


def ia3(layer: str, length: int, on_input: int) -> dict[str, Tensor]:
    return {f"{layer}.weight": draw("factors", (length,)), f"{layer}.on_input": torch.tensor(on_input)}


def glora(layer: str, rank: int = 4, rows: int = C) -> dict[str, Tensor]:
    shapes = {"a1": (C, rank), "a2": (rank, C), "b1": (rows, rank), "b2": (rank, C)}
    return {f"{layer}.{name}.weight": draw(name, shape) * 0.1 for name, shape in shapes.items()}


def rotation(blocks: Tensor, bound: float = 0.0) -> Tensor:
    """The matrix that the blocks make, column by column of its inverse's definition."""
    skew = blocks.double() - blocks.double().transpose(1, 2)
    length = skew.square().sum().sqrt()
    if 0 < bound < length:
        skew = skew * bound / length
    one = torch.eye(blocks.shape[1], dtype=torch.float64)
    return torch.block_diag(*[(one + block) @ torch.linalg.inv(one - block) for block in skew])


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3_of_rows_and_of_columns(on_input: int, strength: float) -> None:
    tensors = ia3(LAYER, C, on_input)
    factors = 1 + tensors[f"{LAYER}.weight"].double()
    expected = pristine(WEIGHT) * (factors[None, :] if on_input else factors[:, None])
    assert_merges_to(parsed(tensors), {WEIGHT: expected}, strength)
    stored = factors.float().reshape((1, C) if on_input else (C, 1))
    assert_merges_to(parsed({f"base_model.model.{PROJ}.ia3_l": stored}), {WEIGHT: expected}, strength)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft(rescaled: bool, alpha: float) -> None:
    blocks = draw("blocks", (4, 8, 8)) * 0.3
    tensors = {f"{LAYER}.oft_blocks": blocks, f"{LAYER}.alpha": torch.tensor(alpha)}
    turn = rotation(blocks, alpha * C)
    assert torch.allclose(turn @ turn.T, torch.eye(C, dtype=torch.float64))
    expected = turn.T @ pristine(WEIGHT)
    if rescaled:
        rescale = 1 + draw("rescale", (C, 1)) * 0.1
        tensors[f"{LAYER}.rescale"] = rescale
        expected = rescale.double() * expected
    assert_merges_to(parsed(tensors), {WEIGHT: expected}, 0.7)


@pytest.mark.parametrize("old_names", [False, True])
def test_glora(old_names: bool) -> None:
    tensors = glora(LAYER)
    a1, a2, b1, b2 = (tensors[f"{LAYER}.{name}.weight"].double() for name in ("a1", "a2", "b1", "b2"))
    expected = pristine(WEIGHT) + (2 / 4) * (pristine(WEIGHT) @ a1 @ a2 + b1 @ b2)
    if old_names:
        swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
        tensors = {f"{LAYER}.{swap[key.split('.')[-2]]}.weight": tensor for key, tensor in tensors.items()}
    assert_merges_to(parsed(tensors | {f"{LAYER}.alpha": torch.tensor(2.0)}), {WEIGHT: expected}, -0.6)


def test_the_layer_whose_halves_change_places() -> None:
    shift, scale = pristine(SWAPPED).chunk(2)
    in_file = torch.cat([scale, shift])
    blocks, halves = draw("blocks", (8, 8, 8)) * 0.3, ia3(HALVES, 2 * C, 0)
    turned = rotation(blocks).T @ in_file
    scaled = in_file * (1 + halves[f"{HALVES}.weight"].double()[:, None])
    files: list[tuple[dict[str, Tensor], Tensor]] = [({f"{HALVES}.oft_blocks": blocks}, turned), (halves, scaled)]
    for tensors, wanted in files:
        first, second = wanted.chunk(2)
        assert_merges_to(parsed(tensors), {SWAPPED: torch.cat([second, first])})


def test_rows_of_a_fused_matrix() -> None:
    layer = "transformer.transformer_blocks.0.attn.to_k"
    expected = pristine(f"{QKV}.weight")
    expected[C : 2 * C] = rotation(draw("blocks", (2, 16, 16)) * 0.3).T @ expected[C : 2 * C]
    assert_merges_to(parsed({f"{layer}.oft_blocks": draw("blocks", (2, 16, 16)) * 0.3}), {f"{QKV}.weight": expected})


def test_several_adapters_give_the_same_bits_in_any_order() -> None:
    """Each changes the pristine weight, so none sees what another did."""
    files = [parsed(tensors) for tensors in (ia3(LAYER, C, 1), {f"{LAYER}.oft_blocks": draw("b", (4, 8, 8))}, glora(LAYER))]
    files.append(parsed(low_rank(LAYER)))
    chosen = [(file, 0.3 + 0.2 * i) for i, file in enumerate(files)]
    sums = [merged_tensor(recipe_source(SHAPES), WEIGHT, order) for order in (chosen, chosen[::-1], chosen[2:] + chosen[:2])]
    assert all(torch.equal(one, sums[0]) for one in sums)
    alone = [merged_tensor(recipe_source(SHAPES), WEIGHT, [one]).double() - pristine(WEIGHT) for one in chosen]
    assert torch.allclose(sums[0].double(), pristine(WEIGHT) + sum(alone), atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (ia3(LAYER, C + 1, 0), r"shape \[33\], expected \[32\] or \[1, 32\]"),
        ({f"{LAYER}.on_input": torch.tensor(1)}, "the IA3 factors matrix is missing|the down matrix is missing"),
        ({**ia3(LAYER, C, 0), f"{LAYER}.on_input": torch.tensor([1, 2])}, "on_input is missing or not a single number"),
        ({f"{LAYER}.ia3_l": torch.ones(C)}, r"shape \[32\], expected \[32, 1\] or \[1, 32\]"),
        ({f"{LAYER}.oft_blocks": torch.ones(4, 8, 7)}, r"shape \[4, 8, 7\], expected \[blocks, n, n\] with blocks \* n = 32"),
        ({f"{LAYER}.oft_blocks": torch.ones(5, 8, 8)}, r"shape \[5, 8, 8\]"),
        ({f"{LAYER}.oft_blocks": torch.ones(2, 4, 8, 8)}, r"BOFT \(butterfly rotations\)"),
        (
            {f"{LAYER}.oft_blocks": torch.ones(4, 8, 8), f"{LAYER}.rescale": torch.ones(3, 1)},
            r"shape \[3, 1\], expected \[32, 1\]",
        ),
        ({f"{LAYER}.oft_blocks": torch.full((4, 8, 8), torch.nan)}, "infinite or not a number"),
        ({f"{LAYER}.oft_blocks": torch.ones(4, 8, 8), f"{LAYER}.dora_scale": torch.ones(C, 1)}, "a DoRA magnitude beside OFT"),
        (glora(LAYER) | {f"{LAYER}.b1.weight": torch.ones(C, 3)}, r"GLoRA's a1, a2, b1, b2 of shapes \[32, 4\]"),
        (glora(LAYER, rank=C), "GLoRA's a1, a2, b1, b2 of shapes"),
        ({f"{LAYER}.a1.weight": torch.ones(C, 4)}, "the a2 matrix is missing"),
        (glora(LAYER) | low_rank(LAYER), "low-rank and GLoRA for one layer"),
        ({f"base_model.model.{PROJ}.oft_R.weight": torch.ones(4, 28)}, "OFT or BOFT of PEFT, whose meaning changed"),
        ({f"{LAYER}.weight": torch.ones(C)}, "not a key of a LoRA"),
    ],
)
def test_files_that_are_not_whole(tensors: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        parsed(tensors)
