"""Every kind of adapter against its formula, computed apart in float64 from the tensors as the file has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import LAYER, PROJ, QKV, SHAPES, C, assert_merges_to, low_rank, parsed, pristine
from narrow_model import NARROW
from torch import Tensor

from uso_engine.errors import LoRAError
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.files.tensor_source import MemorySource
from uso_engine.weights.lora import parse_lora, read_lora
from uso_engine.weights.lora.scaling import PeftScaling
from uso_engine.weights.recipe import draw

E, D = NARROW.mlp_width, NARROW.head_dim
QUERY_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


def _tensors(layer: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{layer}.{part}": draw(f"{layer}.{part}", shape) for part, shape in shapes.items()}


def _product(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    return tensors[f"{layer}.lora_up.weight"].double() @ tensors[f"{layer}.lora_down.weight"].double()


@pytest.mark.parametrize("strength", [1.0, -0.3])
@pytest.mark.parametrize(
    ("shapes", "alpha", "scale"),
    [
        ({"lokr_w1": (4, 8), "lokr_w2": (8, 4)}, 3.0, 1.0),  # two whole factors have no rank
        ({"lokr_w1": (4, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)}, 3.0, 3.0 / 2),
        ({"lokr_w1_a": (4, 5), "lokr_w1_b": (5, 8), "lokr_w2": (8, 4)}, 3.0, 3.0 / 5),
        ({"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)}, 3.0, 3.0 / 2),
        ({"lokr_w1": (4, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)}, None, 1.0),
    ],
)
def test_lokr(shapes: dict[str, tuple[int, int]], alpha: float | None, scale: float, strength: float) -> None:
    tensors = _tensors(LAYER, **shapes)
    factors = []
    for number in (1, 2):
        whole = tensors.get(f"{LAYER}.lokr_w{number}")
        if whole is None:
            whole = tensors[f"{LAYER}.lokr_w{number}_a"].double() @ tensors[f"{LAYER}.lokr_w{number}_b"].double()
        factors.append(whole.double())
    if alpha is not None:
        tensors[f"{LAYER}.alpha"] = torch.tensor(alpha)
    first, second = factors
    change = torch.einsum("ab,cd->acbd", first, second).reshape(C, C) * scale
    assert_merges_to(parsed(tensors), {f"{PROJ}.weight": pristine(f"{PROJ}.weight") + change}, strength)


def test_loha() -> None:
    tensors = _tensors(LAYER, hada_w1_a=(C, 4), hada_w1_b=(4, C), hada_w2_a=(C, 4), hada_w2_b=(4, C))
    a, b, c, d = (tensors[f"{LAYER}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    change = (a @ b) * (c @ d) * (2.0 / 4)
    assert_merges_to(
        parsed(tensors | {f"{LAYER}.alpha": torch.tensor(2.0)}), {f"{PROJ}.weight": pristine(f"{PROJ}.weight") + change}, -0.7
    )


def test_pefts_lokr_and_loha_take_alpha_from_their_settings(tmp_path: Path) -> None:
    whole = _tensors(LAYER, lokr_w1=(4, 8), lokr_w2=(8, 4))
    change = torch.einsum("ab,cd->acbd", *(whole[f"{LAYER}.lokr_w{n}"].double() for n in (1, 2))).reshape(C, C)
    loha = _tensors(LAYER, hada_w1_a=(C, 4), hada_w1_b=(4, C), hada_w2_a=(C, 4), hada_w2_b=(4, C))
    a, b, c, d = (loha[f"{LAYER}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    for kind, tensors, expected in (("LOKR", whole, change * (6 / 4)), ("LOHA", loha, (a @ b) * (c @ d) * (6 / 4))):
        write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "alpha": 6, "r": 4}))
        assert_merges_to(read_lora(tmp_path, NARROW), {f"{PROJ}.weight": pristine(f"{PROJ}.weight") + expected})


@pytest.mark.parametrize("ending", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("shape", [(C, 1), (C,), (1, C)])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora(ending: str, shape: tuple[int, ...], strength: float) -> None:
    tensors = low_rank(LAYER)
    magnitude = 1 + draw("m", (C,)).abs()
    file = tensors | {f"{LAYER}.{ending}": magnitude.reshape(shape), f"{LAYER}.alpha": torch.tensor(2.0)}
    moved = pristine(f"{PROJ}.weight") + _product(tensors, LAYER) * (2.0 / 4)
    axis = 0 if shape == (1, C) else 1
    lengths = moved.square().sum(axis, keepdim=True).sqrt()
    expected = magnitude.double().reshape(lengths.shape) * moved / lengths
    assert_merges_to(parsed(file), {f"{PROJ}.weight": expected}, strength)


@pytest.mark.parametrize("shape", [(2 * C, 1), (1, C)])
def test_dora_of_the_layer_whose_halves_change_places(shape: tuple[int, ...]) -> None:
    layer = "transformer.norm_out.linear"
    tensors = low_rank(layer, 2 * C)
    magnitude = 1 + draw("m", shape).abs()
    key = "final_layer.adaLN_modulation.1.weight"
    shift, scale = pristine(key).chunk(2)
    moved = torch.cat([scale, shift]) + _product(tensors, layer)
    lengths = moved.square().sum(1 if shape[1] == 1 else 0, keepdim=True).sqrt()
    scale, shift = (magnitude.double() * moved / lengths).chunk(2)
    assert_merges_to(parsed(tensors | {f"{layer}.dora_scale": magnitude}), {key: torch.cat([shift, scale])})


def test_dora_and_loha_of_rows_of_a_fused_matrix() -> None:
    query, value = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_v"
    tensors = low_rank(query) | _tensors(value, hada_w1_a=(C, 2), hada_w1_b=(2, C), hada_w2_a=(C, 2), hada_w2_b=(2, C))
    magnitude = 1 + draw("m", (C, 1)).abs()
    expected = pristine(f"{QKV}.weight")
    moved = expected[:C] + _product(tensors, query)
    expected[:C] = magnitude.double() * moved / moved.square().sum(1, keepdim=True).sqrt()
    a, b, c, d = (tensors[f"{value}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    expected[2 * C :] += (a @ b) * (c @ d)
    assert_merges_to(parsed(tensors | {f"{query}.dora_scale": magnitude}), {f"{QKV}.weight": expected})


def test_differences_of_weights_biases_and_norms() -> None:
    tensors = {
        f"{LAYER}.diff": draw("a", (C, C)),
        f"{LAYER}.diff_b": draw("b", (C,)),
        f"{LAYER}.alpha": torch.tensor(7.0),  # does not count
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": draw("c", (D,)),
        "lora_unet_single_blocks_0_norm_key_norm.w_norm": draw("d", (D,)),
        "transformer.transformer_blocks.0.attn.norm_added_q.diff": draw("e", (D,)),
    }
    names = {
        f"{PROJ}.weight": "a",
        f"{PROJ}.bias": "b",
        QUERY_NORM: "c",
        "single_blocks.0.norm.key_norm.scale": "d",
        "double_blocks.0.txt_attn.norm.query_norm.scale": "e",
    }
    expected = {key: pristine(key) + draw(name, SHAPES[key]).double() for key, name in names.items()}
    assert_merges_to(parsed(tensors), expected, 0.5)


def test_biases_of_up_matrices_are_scaled_as_the_product_is() -> None:
    layer = "transformer.single_transformer_blocks.0.proj_mlp"
    tensors = {f"{layer}.lora_A.weight": draw("a", (4, C)), f"{layer}.lora_B.weight": draw("b", (E, 4))}
    tensors[f"{layer}.lora_B.bias"] = draw("c", (E,))
    weight, bias = pristine("single_blocks.0.linear1.weight"), pristine("single_blocks.0.linear1.bias")
    weight[3 * C :] += 2 * draw("b", (E, 4)).double() @ draw("a", (4, C)).double()
    bias[3 * C :] += 2 * draw("c", (E,)).double()
    expected = {"single_blocks.0.linear1.weight": weight, "single_blocks.0.linear1.bias": bias}
    assert_merges_to(parsed(tensors, PeftScaling(alpha=8.0)), expected, -1.5)


def test_changes_that_are_zero_are_left_out() -> None:
    zeros = {
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.zeros(D),
        f"{LAYER}.diff_b": torch.zeros(C),
        f"{LAYER}.lora_up.bias": torch.zeros(C),
    }
    assert set(parsed(low_rank(LAYER) | zeros).updates) == {f"{PROJ}.weight"}
    with pytest.raises(LoRAError, match=r"only differences that are zero \(3 keys\)"):
        parsed(zeros)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            _tensors(LAYER, lokr_w1=(4, 8), lokr_w2=(8, 8)),
            r"factors of shape \[4, 8\] and \[8, 8\] make \[32, 64\], expected \[32, 32\]",
        ),
        (_tensors(LAYER, lokr_w1=(4, 8)), "the lokr_w2 matrix is missing"),
        (_tensors(LAYER, lokr_w1=(4, 8), lokr_w2_a=(8, 2)), "the lokr_w2_b matrix is missing"),
        (_tensors(LAYER, lokr_w1=(4, 8), lokr_w2_a=(8, 2), lokr_w2_b=(3, 4)), r"shape \[3, 4\], expected \[2, columns\]"),
        (_tensors(LAYER, lokr_w1=(4, 8), lokr_w2=(8, 4), lokr_w2_a=(8, 2), lokr_w2_b=(2, 4)), "lokr_w2 both whole and as a"),
        (_tensors(LAYER, lokr_w1=(32,), lokr_w2=(1, 32)), r"shape \[32\], expected a matrix"),
        (_tensors(LAYER, hada_w1_a=(C, 4), hada_w1_b=(4, C)), "the hada_w2_a matrix is missing"),
        (
            _tensors(LAYER, hada_w1_a=(C, 4), hada_w1_b=(4, C), hada_w2_a=(C, 3), hada_w2_b=(4, C)),
            r"shape \[32, 3\], expected \[32, 4\]: .*hada_w2_a",
        ),
        (_tensors(LAYER, diff=(C, C + 1)), r"shape \[32, 33\], expected \[32, 32\]"),
        (_tensors(LAYER, diff_b=(C + 1,)), r"shape \[33\], expected \[32\]"),
        (low_rank(LAYER) | _tensors(LAYER, diff=(C, C)), "low-rank and difference for one layer"),
        (low_rank(LAYER) | _tensors(LAYER, dora_scale=(3, 1)), r"shape \[3, 1\], expected \[32, 1\] or \[32\] or \[1, 32\]"),
        (_tensors(LAYER, diff=(C, C), dora_scale=(C, 1)), "a DoRA magnitude beside a difference"),
        (_tensors(LAYER, dora_scale=(C, 1)), "the down matrix is missing"),
        ({f"{LAYER}.lora_B.bias": torch.ones(C)}, "a bias of an up matrix that is missing"),
        ({f"{LAYER}.diff": torch.full((C, C), torch.nan)}, "infinite or not a number"),
        ({f"{LAYER}.diff": torch.ones(C, C, dtype=torch.int8)}, "not floating-point numbers"),
        (low_rank("diffusion_model.double_blocks.0.img_attn.norm.query_norm", D, 1), "low-rank for a norm, which is a vector"),
        (_tensors("diffusion_model.double_blocks.0.img_attn.norm.query_norm", b_norm=(D,)), "bias of a norm, which has none"),
    ],
)
def test_adapters_that_are_not_whole(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        parsed(tensors)


def test_a_bias_where_the_layer_has_none() -> None:
    without = replace(NARROW, qkv_bias=False)
    tensors = {f"diffusion_model.{QKV}.diff_b": torch.ones(3 * C)}
    with pytest.raises(LoRAError, match=rf"a change of a bias that the layer does not have: diffusion_model\.{QKV}\.diff_b"):
        parse_lora(MemorySource(tensors, "file"), without)
    assert set(parsed(tensors).updates) == {f"{QKV}.bias"}


def test_settings_that_say_dora_of_a_file_without_magnitudes() -> None:
    with pytest.raises(LoRAError, match="no layer has a magnitude"):
        parsed(low_rank(LAYER), PeftScaling(uses_dora=True))


@pytest.mark.parametrize("name", ["diffusion_model.img_in", "transformer.x_embedder", "img_in"])
def test_control_loras_are_refused_with_the_reason(name: str) -> None:
    columns = 2 * NARROW.in_channels
    tensors = {f"{name}.lora_A.weight": torch.ones(4, columns), f"{name}.lora_B.weight": torch.ones(C, 4)}
    with pytest.raises(LoRAError, match=r"a control LoRA .* takes 16 input channels, the transformer has 8"):
        parsed(tensors | {QUERY_NORM: torch.ones(D)})
