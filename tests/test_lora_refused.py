"""LoRA files that cannot be merged are refused before anything changes, with every key at fault in one message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from narrow_model import NARROW
from torch import Tensor

from uso_engine.errors import LoRAError, MissingFileError
from uso_engine.model.params import TransformerParams
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.lora import read_lora
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw

PARAMS = replace(NARROW, depth=2, depth_single_blocks=2)
GOOD = "diffusion_model.double_blocks.0.img_attn.proj"
KOHYA = "lora_unet_double_blocks_1_txt_attn_proj"


def _layer(name: str, rows: int = 32, columns: int = 32, rank: int = 3) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(rank, columns), f"{name}.lora_up.weight": torch.ones(rows, rank)}


def _refusal(folder: Path, tensors: Mapping[str, Tensor], params: TransformerParams = PARAMS) -> str:
    path = folder / "l.safetensors"
    write_safetensors(path, {**_layer(GOOD), **tensors})
    with pytest.raises(LoRAError) as caught:
        read_lora(path, params)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.magnitude", "DoRA"),
        ("lycoris_x.lokr_w3", "LoKr"),
        ("lycoris_x.lokr_t2", "middle part"),
        ("lora_unet_x.hada_w3_a", "LoHa"),
        ("lora_unet_x.hada_t1", "middle part"),
        ("base_model.model.x.oft_R.default.weight", "OFT"),
        ("base_model.model.x.boft_s", "BOFT"),
        ("lora_unet_x.bm.weight", "GLoRA"),
        ("lora_unet_x.lora_mid.weight", "lora_mid"),
        ("img_in.lora_A.bias", "lora_A.bias"),
        ("lora_unet_x.set_weight", "whole new weight"),
        ("single_blocks.0.norm.key_norm.scale", "whole new weight"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(key: str, kind: str, tmp_path: Path) -> None:
    message = _refusal(tmp_path, {key: torch.ones(1)})
    assert kind in message
    assert key in message


def test_the_alpha_of_a_refused_adapter_is_not_a_second_complaint(tmp_path: Path) -> None:
    message = _refusal(tmp_path, {"lycoris_x.oft_R": torch.ones(1), "lycoris_x.alpha": torch.ones(1)})
    assert "lycoris_x.alpha" not in message


def test_all_faults_are_in_one_message(tmp_path: Path) -> None:
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.ones(3, 32),  # no up
        "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(128, 3),  # no down
        **_layer("lora_unet_double_blocks_9_img_mlp_0", 128),
        **_layer("diffusion_model.blocks.0.attn.qkv"),
        **_layer("transformer.transformer_blocks.0.attn.to_q", columns=31),
        **_layer("transformer.transformer_blocks.0.attn.to_k", rows=33),
        "something.else": torch.ones(1),
    }
    message = _refusal(tmp_path, tensors)
    tried = "tried the key styles USO / XLabs, ComfyUI / Black Forest Labs, diffusers / PEFT, kohya"
    for expected in (
        f"the up matrix is missing beside: {KOHYA}.lora_down.weight",
        "the down matrix is missing beside: lora_unet_double_blocks_0_img_mlp_0.lora_up.weight",
        "layers that this transformer does not have: lora_unet_double_blocks_9_img_mlp_0.lora_down.weight",
        f"layers that are not known ({tried}): diffusion_model.blocks.0.attn.qkv.lora_down.weight",
        "shape [3, 31], expected [rank, 32]: transformer.transformer_blocks.0.attn.to_q.lora_down.weight",
        "shape [33, 3], expected [32, 3]: transformer.transformer_blocks.0.attn.to_k.lora_up.weight",
        "not a key of a LoRA: something.else",
    ):
        assert expected in message
    assert GOOD not in message


def test_an_alpha_without_matrices(tmp_path: Path) -> None:
    message = _refusal(tmp_path, {f"{KOHYA}.alpha": torch.tensor(1.0)})
    assert f"the down matrix is missing beside: {KOHYA}.alpha" in message


def test_guidance_layers_do_not_exist_in_schnell(tmp_path: Path) -> None:
    message = _refusal(tmp_path, _layer("lora_unet_guidance_in_out_layer"), replace(PARAMS, guidance_embed=False))
    assert "layers that this transformer does not have" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_no_numbers(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    up = torch.ones(32, 3)
    up[31, 2] = value
    message = _refusal(tmp_path, {f"{KOHYA}.lora_down.weight": torch.ones(3, 32), f"{KOHYA}.lora_up.weight": up.to(dtype)})
    assert f"infinite or not a number: {KOHYA}.lora_up.weight" in message


def test_alphas_that_are_no_number(tmp_path: Path) -> None:
    layer = _layer(KOHYA)
    assert f"alpha is not a finite number: {KOHYA}.alpha" in _refusal(
        tmp_path, layer | {f"{KOHYA}.alpha": torch.tensor(math.nan)}
    )
    assert f"alpha is not a single number: {KOHYA}.alpha" in _refusal(tmp_path, layer | {f"{KOHYA}.alpha": torch.ones(2)})


def test_odd_shapes_and_types(tmp_path: Path) -> None:
    empty = {f"{KOHYA}.lora_down.weight": torch.ones(0, 32), f"{KOHYA}.lora_up.weight": torch.ones(32, 0)}
    assert "shape [0, 32], expected [rank, 32]" in _refusal(tmp_path, empty)
    vector = {f"{KOHYA}.lora_down.weight": torch.ones(32), f"{KOHYA}.lora_up.weight": torch.ones(32, 1)}
    assert "shape [32], expected [rank, 32]" in _refusal(tmp_path, vector)
    kernel = {f"{KOHYA}.lora_down.weight": torch.ones(3, 32, 3, 3), f"{KOHYA}.lora_up.weight": torch.ones(32, 3, 1, 1)}
    assert "shape [3, 32, 3, 3]" in _refusal(tmp_path, kernel)
    integers = {key: tensor.to(torch.int8) for key, tensor in _layer(KOHYA).items()}
    assert f"not floating-point numbers: {KOHYA}.lora_down.weight" in _refusal(tmp_path, integers)


def test_a_layer_given_twice_is_refused(tmp_path: Path) -> None:
    twice = _layer("lora_unet_double_blocks_0_img_attn_proj", rank=2)
    assert "the same rows of double_blocks.0.img_attn.proj.weight" in _refusal(tmp_path, twice)
    adapters = {f"{KOHYA}.lora_A.{name}.weight": torch.ones(3, 32) for name in ("a", "b")}
    assert "the same part of a layer twice" in _refusal(tmp_path, adapters)


def test_a_checkpoint_and_a_text_encoder_lora_are_no_loras(tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    write_safetensors(path, {key: draw(key, shape) for key, shape in transformer_shapes(PARAMS).items()})
    with pytest.raises(LoRAError, match=r"not a key of a LoRA: .*double_blocks.\{0-1\}.img_attn.qkv.weight"):
        read_lora(path, PARAMS)
    write_safetensors(path, _layer("lora_te1_text_model_encoder_layers_0_mlp_fc1"))
    with pytest.raises(LoRAError, match="only layers of text encoders"):
        read_lora(path, PARAMS)
    write_safetensors(path, {})
    with pytest.raises(LoRAError, match="holds no tensors"):
        read_lora(path, PARAMS)


def test_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        read_lora(tmp_path / "none.safetensors", PARAMS)
    with pytest.raises(MissingFileError, match=r"no \.safetensors file"):
        read_lora(tmp_path, PARAMS)
    (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LoRAError, match="git-lfs"):
        read_lora(tmp_path, PARAMS)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(LoRAError, match="several files"):
        read_lora(tmp_path, PARAMS)


def test_hostile_key_names_stay_short_in_messages(tmp_path: Path) -> None:
    message = _refusal(tmp_path, {"\x1b[31m" + "x.lora_B" * 200_000: torch.ones(1)})
    assert len(message) < 1000
    assert "\x1b" not in message
