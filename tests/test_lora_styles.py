"""Every key style of LoRA changes the rows it should: products written as each tool writes them, read back and merged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import assert_merges_to, pristine
from narrow_model import NARROW
from torch import Tensor

from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.lora import LoRA, read_lora
from uso_engine.weights.lora.key_styles import KEY_STYLES
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw

PARAMS = replace(NARROW, depth=2, depth_single_blocks=2)
C, E = PARAMS.hidden_size, PARAMS.mlp_width
SHAPES = transformer_shapes(PARAMS)
Change = Mapping[str, Tensor]


def _pair(name: str, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Down and up of one layer."""
    return draw(f"{name}.down", (rank, columns)), draw(f"{name}.up", (rows, rank))


def _assert_adds(lora: LoRA, change: Change, strength: float = 1.0) -> None:
    """The LoRA changes exactly these weights by exactly this much."""
    expected = {key: pristine(key, PARAMS) + value.double() for key, value in change.items()}
    assert_merges_to(lora, expected, strength, params=PARAMS, absolute=1e-5, relative=0)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    write_safetensors(path, tensors, metadata)
    return path


# Layers of one block of each kind and the ends, by canonical name, cut as the style in question cuts them.
UsoLayer = tuple[str, str, int, int]
USO_LAYERS: list[UsoLayer] = [
    *(
        (f"double_blocks.{i}.processor.{part}_lora{n}", f"double_blocks.{i}.{stream}_attn.{part}", rows, C)
        for i in range(2)
        for n, stream in ((1, "img"), (2, "txt"))
        for part, rows in (("qkv", 3 * C), ("proj", C))
    ),
    *((f"single_blocks.{i}.processor.qkv_lora", f"single_blocks.{i}.linear1", 3 * C, C) for i in range(2)),
    *((f"single_blocks.{i}.processor.proj_lora", f"single_blocks.{i}.linear2", C, C + E) for i in range(2)),
]


def _uso(down: str, up: str, rename: Callable[[str], str], rank: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A whole USO LoRA under some names, and the change of the weights that it means."""
    tensors, change = {}, {}
    for name, canonical, rows, columns in USO_LAYERS:
        a, b = _pair(name, rows, columns, rank)
        tensors[rename(name) + down], tensors[rename(name) + up] = a, b
        full = torch.zeros(SHAPES[f"{canonical}.weight"])
        full[:rows] = b @ a
        change[f"{canonical}.weight"] = full
    return tensors, change


def _comfyui_name(name: str) -> str:
    for ours, theirs in (
        ("processor.qkv_lora1", "img_attn.qkv"),
        ("processor.qkv_lora2", "txt_attn.qkv"),
        ("processor.proj_lora1", "img_attn.proj"),
        ("processor.proj_lora2", "txt_attn.proj"),
        ("processor.qkv_lora", "linear1_qkv"),
        ("processor.proj_lora", "linear2"),
    ):
        if name.endswith(ours):
            return "diffusion_model." + name.replace(ours, theirs)
    raise AssertionError(name)


def test_usos_own_keys(tmp_path: Path) -> None:
    tensors, change = _uso(".down.weight", ".up.weight", lambda name: name)
    lora = read_lora(_write(tmp_path / "dit_lora.safetensors", tensors), PARAMS)
    _assert_adds(lora, change)
    _assert_adds(lora, change, strength=-0.3)
    assert lora.style == "USO / XLabs"
    assert lora.skipped_keys == 0


def test_comfyuis_repackaged_uso_lora_is_the_same(tmp_path: Path) -> None:
    tensors, change = _uso(".lora_down.weight", ".lora_up.weight", _comfyui_name)
    assert "diffusion_model.single_blocks.1.linear1_qkv.lora_up.weight" in tensors
    _assert_adds(read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS), change)


def test_xlabs_loras_have_double_blocks_only(tmp_path: Path) -> None:
    tensors, change = _uso(".down.weight", ".up.weight", lambda name: name, rank=3)
    tensors = {f"diffusion_model.{key}": t for key, t in tensors.items() if key.startswith("double")}
    change = {key: t for key, t in change.items() if key.startswith("double")}
    _assert_adds(read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS), change)


# diffusers' layers: name there -> canonical key, rows of it, columns. Ranks differ from layer to layer.
DIFFUSERS_LAYERS: dict[str, tuple[str, slice, int]] = {
    "x_embedder": ("img_in", slice(0, C), 8),
    "context_embedder": ("txt_in", slice(0, C), 20),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", slice(0, C), 256),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", slice(0, C), C),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", slice(0, C), 12),
    "transformer_blocks.1.norm1.linear": ("double_blocks.1.img_mod.lin", slice(0, 6 * C), C),
    "transformer_blocks.1.norm1_context.linear": ("double_blocks.1.txt_mod.lin", slice(0, 6 * C), C),
    "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", slice(0, C), C),
    "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", slice(2 * C, 3 * C), C),
    "transformer_blocks.1.attn.add_q_proj": ("double_blocks.1.txt_attn.qkv", slice(0, C), C),
    "transformer_blocks.1.attn.add_k_proj": ("double_blocks.1.txt_attn.qkv", slice(C, 2 * C), C),
    "transformer_blocks.1.attn.add_v_proj": ("double_blocks.1.txt_attn.qkv", slice(2 * C, 3 * C), C),
    "transformer_blocks.1.attn.to_out.0": ("double_blocks.1.img_attn.proj", slice(0, C), C),
    "transformer_blocks.1.attn.to_add_out": ("double_blocks.1.txt_attn.proj", slice(0, C), C),
    "transformer_blocks.1.ff.net.0.proj": ("double_blocks.1.img_mlp.0", slice(0, E), C),
    "transformer_blocks.1.ff.net.2": ("double_blocks.1.img_mlp.2", slice(0, C), E),
    "transformer_blocks.1.ff_context.net.0.proj": ("double_blocks.1.txt_mlp.0", slice(0, E), C),
    "transformer_blocks.1.ff_context.net.2": ("double_blocks.1.txt_mlp.2", slice(0, C), E),
    "single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1", slice(C, 2 * C), C),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", slice(3 * C, 3 * C + E), C),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", slice(0, C), C + E),
    "single_transformer_blocks.0.norm.linear": ("single_blocks.0.modulation.lin", slice(0, 3 * C), C),
    "proj_out": ("final_layer.linear", slice(0, 8), C),
}


def _diffusers(name: Callable[[str], str], down: str, up: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    for number, (layer, (canonical, rows, columns)) in enumerate(DIFFUSERS_LAYERS.items()):
        a, b = _pair(layer, rows.stop - rows.start, columns, rank=1 + number % 7)
        tensors[name(layer) + down], tensors[name(layer) + up] = a, b
        key = f"{canonical}.weight"
        change.setdefault(key, torch.zeros(SHAPES[key]))[rows] += b @ a
    a, b = _pair("norm_out.linear", 2 * C, C, 3)
    tensors[name("norm_out.linear") + down], tensors[name("norm_out.linear") + up] = a, b
    scale, shift = (b @ a).chunk(2)  # diffusers' order; ours is shift, scale
    change["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    return tensors, change


@pytest.mark.parametrize(
    "prefix", ["transformer.", "", "base_model.model.", "base_model.model.transformer.", "transformer.base_model.model."]
)
@pytest.mark.parametrize("middle", ["", ".default", ".my-adapter_1"])
def test_diffusers_and_peft_keys(prefix: str, middle: str, tmp_path: Path) -> None:
    tensors, change = _diffusers(lambda layer: prefix + layer, f".lora_A{middle}.weight", f".lora_B{middle}.weight")
    lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    _assert_adds(lora, change)
    assert lora.style == "diffusers / PEFT"


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_", "lora_unet_", "lora_prior_unet_"])
def test_flattened_diffusers_keys_of_other_trainers(prefix: str, tmp_path: Path) -> None:
    tensors, change = _diffusers(lambda layer: prefix + layer.replace(".", "_"), ".lora_down.weight", ".lora_up.weight")
    _assert_adds(read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS), change)


def _bfl(name: Callable[[str], str], down: str, up: str, alpha: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of every matrix of the model."""
    tensors: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    for number, (key, shape) in enumerate(SHAPES.items()):
        if len(shape) != 2:
            continue
        rank = 1 + number % 5
        layer = name(key.removesuffix(".weight"))
        a, b = _pair(key, *shape, rank)
        tensors[layer + down], tensors[layer + up] = a, b
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
        change[key] = b @ a * (1.0 if alpha is None else alpha / rank)
    return tensors, change


def test_kohya_keys_with_alpha_cover_every_matrix(tmp_path: Path) -> None:
    tensors, change = _bfl(
        lambda layer: "lora_unet_" + layer.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", alpha=2.0
    )
    lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    _assert_adds(lora, change)
    assert lora.style == "kohya"


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "transformer.", "model.diffusion_model."])
def test_dotted_keys_of_black_forest_labs_cover_every_matrix(prefix: str, tmp_path: Path) -> None:
    tensors, change = _bfl(lambda layer: prefix + layer, ".lora_A.weight", ".lora_B.weight", alpha=None)
    _assert_adds(read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS), change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_stored_types(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = _pair("l", C, C, 4)
    tensors = {
        "transformer_blocks.0.attn.to_k.lora_A.weight": a.to(dtype),
        "transformer_blocks.0.attn.to_k.lora_B.weight": b.to(dtype),
    }
    change = torch.zeros(3 * C, C)
    change[C : 2 * C] = b.to(dtype).float() @ a.to(dtype).float()
    _assert_adds(
        read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS), {"double_blocks.0.img_attn.qkv.weight": change}
    )


def test_kernels_of_one_by_one_convolutions_are_matrices(tmp_path: Path) -> None:
    a, b = _pair("l", C, C, 4)
    tensors = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": a[:, :, None, None]}
    tensors["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"] = b[:, :, None, None]
    lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    _assert_adds(lora, {"double_blocks.0.img_attn.proj.weight": b @ a})


def test_text_encoder_layers_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {}
    for layer in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_double_blocks_0_img_attn_proj"):
        tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"] = _pair(layer, C, C, 2)
    tensors["text_encoder_2.encoder.x.lora_A.weight"] = torch.ones(1)
    with caplog.at_level(logging.WARNING):
        lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    assert set(lora.updates) == {"double_blocks.0.img_attn.proj.weight"}
    assert lora.skipped_keys == 3
    assert "3 keys for text encoders are left out" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1.text_model.encoder.layers.8.mlp.fc1.lora_A.weight",
        "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
        "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight",
        "lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "bundle_emb.word.clip_l",
        "emb_params",
    ],
)
def test_what_belongs_to_prompts_is_left_out(key: str, tmp_path: Path) -> None:
    a, b = _pair("l", C, C, 2)
    good = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{good}.lora_A.weight": a, f"{good}.lora_B.weight": b, key: torch.ones(2, 3)}
    lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    _assert_adds(lora, {"double_blocks.0.img_attn.proj.weight": b @ a})
    assert lora.skipped_keys == 1


def test_numbered_parts_of_onetrainers_files(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    change = torch.zeros(3 * C + E, C)
    for part, rows in enumerate((C, C, C, E)):
        name = f"transformer.single_blocks.1.linear1.{part}"
        a, b = _pair(name, rows, C, 2)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
        change[part * C : part * C + rows] = b @ a / 2
    lora = read_lora(_write(tmp_path / "l.safetensors", tensors), PARAMS)
    _assert_adds(lora, {"single_blocks.1.linear1.weight": change})


def test_style_names_do_not_collide() -> None:
    for style in KEY_STYLES:
        covered: dict[str, set[int]] = {}
        for layer in style.layers(PARAMS).values():
            assert sum(part.rows for part in layer.parts) == layer.rows
            for part in layer.parts:
                covered.setdefault(part.key, set()).update(range(part.row, part.row + part.rows))
        for key, rows in covered.items():
            assert max(rows) < SHAPES[key][0]
    layers = {style.name: style.layers(PARAMS) for style in KEY_STYLES}
    kohya, dotted = layers["kohya"], [*layers["ComfyUI / Black Forest Labs"], *layers["diffusers / PEFT"]]
    assert len(kohya) == len({name.replace(".", "_") for name in dotted}) == len(dotted)
