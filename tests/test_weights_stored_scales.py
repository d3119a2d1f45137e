"""Weights in 8 bits with scales beside them, by their formulas in float64; and the other forms of transformer files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from narrow_model import NARROW, drawn_weights
from torch import Tensor

from uso_engine.errors import CheckpointError
from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import diffusers_shapes
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.files.tensor_source import MemorySource, RecipeSource, TensorSource
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw
from uso_engine.weights.transformer_checkpoint import _canonical, open_transformer_checkpoint

PARAMS = NARROW
SHAPES = transformer_shapes(PARAMS)
WEIGHTS = drawn_weights(PARAMS)
QKV = "double_blocks.0.img_attn.qkv"
Stored = tuple[dict[str, Tensor], dict[str, Tensor]]
"""A file's tensors, and the weights that they mean in float64."""


def _json(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _eight_bits(values: Tensor, by_row: bool, largest: float) -> tuple[Tensor, Tensor]:
    scale = (values.abs().amax(1, keepdim=True) if by_row else values.abs().max().reshape(())) / largest
    return values / scale, scale


def _scaled(form: str, weights: Mapping[str, Tensor], prefix: str = "") -> Stored:
    """Every matrix of the blocks in 8 bits, as the tool in question writes it."""
    tensors: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for key, values in weights.items():
        layer = key.removesuffix(".weight")
        if values.ndim != 2 or "blocks" not in key:
            tensors[prefix + key], truth[key] = values, values.double()
            continue
        quotient, scale = _eight_bits(values, "row" in form or form == "quanto", 127.0 if form == "quanto" else 448.0)
        if form == "quanto":
            stored = quotient.round().to(torch.int8)
            tensors |= {f"{prefix}{key}._data": stored, f"{prefix}{key}._scale": scale}
            tensors |= {f"{prefix}{layer}.{side}_scale": torch.ones(()) for side in ("input", "output")}
        else:
            stored = quotient.to(torch.float8_e4m3fn)
            tensors[prefix + key] = stored
            if form.startswith("old"):
                tensors |= {f"{prefix}{layer}.scale_weight": scale, f"{prefix}{layer}.scale_input": torch.ones(())}
            else:
                tensors |= {f"{prefix}{layer}.weight_scale": scale.flatten() if "row" in form else scale}
                tensors |= {f"{prefix}{layer}.comfy_quant": _json(json.dumps({"format": "float8_e4m3fn"}))}
        truth[key] = stored.double() * scale.double()
    if form.startswith("old"):
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return tensors, truth


def _open(folder: Path, tensors: Mapping[str, Tensor], name: str = "f.safetensors", **metadata: str) -> TensorSource:
    write_safetensors(folder / name, tensors, metadata)
    return open_transformer_checkpoint(folder / name, PARAMS, accept_kontext=False)


FORMS = ["old, per tensor", "old, per row", "new, per tensor", "new, per row", "quanto"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_scaled_weights_are_multiplied(form: str, prefix: str, tmp_path: Path) -> None:
    tensors, truth = _scaled(form, WEIGHTS, prefix)
    source = _open(tmp_path, tensors)
    assert set(source.keys()) == set(SHAPES)
    for key, expected in truth.items():
        found = source.read(key)
        assert found.dtype == source.dtype(key) and found.shape == source.shape(key)
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0), key
        assert torch.allclose(found, WEIGHTS[key], atol=0.05)
    source.close()


@pytest.mark.parametrize("form", FORMS)
def test_scaled_weights_under_diffusers_keys(form: str, tmp_path: Path) -> None:
    weights = {key: draw(key, shape) for key, shape in diffusers_shapes(PARAMS).items()}
    tensors, truth = _scaled(form, weights)
    source = _open(tmp_path, tensors)
    parts = [truth[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]
    assert torch.allclose(source.read(f"{QKV}.weight").double(), torch.cat(parts), rtol=1e-6, atol=0)
    source.close()


def _fault(tensors: dict[str, Tensor], change: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {key: value for key, value in {**tensors, **change}.items() if value is not None}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("old, per tensor", {f"{QKV}.scale_weight": None}, rf"fp8 without a scale, though others have one: {QKV}\.weight"),
        ("old, per tensor", {f"{QKV}.scale_weight": torch.tensor(0.0)}, rf"not positive numbers: {QKV}\.scale_weight"),
        ("old, per row", {f"{QKV}.scale_weight": torch.full((96, 1), torch.nan)}, "not positive numbers"),
        ("old, per row", {f"{QKV}.scale_weight": torch.ones(95, 1)}, r"shape \[95, 1\], expected one scale, or \[96\]"),
        ("old, per tensor", {f"{QKV}.scale_weight": torch.tensor(1)}, "expected floating-point scales"),
        ("old, per tensor", {f"{QKV}.weight": None}, rf"a scale without {QKV}\.weight: {QKV}\.scale_weight"),
        ("old, per tensor", {f"{QKV}.weight": torch.ones(96, 32, dtype=torch.int8)}, "int8 with a scale, expected float8"),
        ("new, per tensor", {f"{QKV}.comfy_quant": _json('{"format": "mxfp8"}')}, "stored as mxfp8, expected float8_e4m3fn"),
        ("new, per tensor", {f"{QKV}.comfy_quant": _json("{")}, "something that is no JSON text"),
        ("new, per tensor", {f"{QKV}.comfy_quant": _json("[]")}, "something that is no JSON object"),
        ("new, per tensor", {f"{QKV}.weight_scale_2": torch.ones(())}, "quantised as nvfp4; use a file in bfloat16"),
        ("quanto", {f"{QKV}.weight._scale": None}, rf"{QKV}\.weight\._scale is missing beside: {QKV}\.weight\._data"),
        ("quanto", {f"{QKV}.weight._data": None}, rf"{QKV}\.weight\._data is missing beside: {QKV}\.weight\._scale"),
        ("quanto", {f"{QKV}.weight._shift": torch.ones(1)}, "optimum-quanto in 4 or 2 bits"),
        ("quanto", {f"{QKV}.weight._data": torch.ones(96, 32, dtype=torch.uint8)}, "uint8 with a scale, expected int8"),
        ("quanto", {f"{QKV}.weight._data": torch.ones(95, 32, dtype=torch.int8)}, r"shape \[96, 1\], expected one scale"),
        ("old, per tensor", {f"{QKV}.weight": torch.ones(96, 31).to(torch.float8_e4m3fn)}, r"of shape \[96, 31\], expected"),
    ],
)
def test_what_is_wrong_with_scales_is_said(
    form: str, change: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _open(tmp_path, _fault(_scaled(form, WEIGHTS)[0], change))
    assert "f.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "tool"),
    [
        ("img_in.weight.absmax", "bitsandbytes"),
        ("img_in.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("double_blocks.0.img_attn.qkv.wscales", "nunchaku"),
        ("double_blocks.0.img_attn.qkv.smooth_factor", "nunchaku"),
        ("img_in.weight_qdata", "torchao"),
        ("img_in.weight:qdata", "torchao"),
        ("img_in.qzeros", "GPTQ or AWQ"),
        ("img_in.weight_scale_inv", "fp8 in blocks"),
    ],
)
def test_other_tools_weights_are_refused_by_name_with_what_to_use(key: str, tool: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"quantised as {tool}.*; use a file in bfloat16, fp8 or GGUF"):
        _open(tmp_path, WEIGHTS | {key: torch.ones(1)})


@pytest.mark.parametrize("prefix", ["transformer.", "model.", "module.", "model.diffusion_model."])
def test_prefixes_norms_and_markers(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {prefix + key.replace("_norm.scale", "_norm.weight"): value for key, value in WEIGHTS.items()}
    markers = {f"{prefix}__index_timestep_zero__": torch.ones(1), "model_ema.decay": torch.ones(1)}
    with caplog.at_level(logging.INFO):
        source = _open(tmp_path, tensors | markers)
    assert all(key in caplog.text for key in markers)
    assert set(source.keys()) == set(SHAPES)
    assert all(torch.equal(source.read(key), value) for key, value in WEIGHTS.items())
    source.close()


def test_one_norm_under_both_names_is_refused(tmp_path: Path) -> None:
    key = f"{QKV.removesuffix('.qkv')}.norm.query_norm"
    with pytest.raises(CheckpointError, match="are the same norm"):
        _open(tmp_path, WEIGHTS | {f"{key}.weight": torch.ones(16)})


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("flux1-dev-kontext_fp8_scaled.safetensors", {}),
        ("FLUX.1-Kontext-dev/transformer/diffusion_pytorch_model.safetensors", {}),
        ("models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/ab12/f.safetensors", {}),
        ("f.safetensors", {"modelspec.title": "FLUX.1 Kontext [dev]"}),
    ],
)
def test_kontext_is_refused_unless_asked_for(name: str, metadata: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match=r"FLUX\.1-Kontext.* set base = \"kontext\""):
        _open(tmp_path, WEIGHTS, name, **metadata)
    open_transformer_checkpoint(tmp_path / name, PARAMS, accept_kontext=True).close()


def test_a_folder_of_that_name_does_not_make_a_file_kontext(tmp_path: Path) -> None:
    (tmp_path / "kontext and dev").mkdir()
    _open(tmp_path, WEIGHTS, "kontext and dev/flux1-dev.safetensors").close()


FULL = TransformerParams()


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "quanto"])
def test_the_full_key_list_of_flux(form: str) -> None:
    """780 keys of which 502 are matrices; shapes alone, no gigabytes."""
    shapes = transformer_shapes(FULL)
    file: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        if len(shape) != 2:
            file[key.replace("_norm.scale", "_norm.weight")] = shape
        elif form == "quanto":
            file |= {f"{key}._data": shape, f"{key}._scale": (shape[0], 1)}
        else:
            file |= {key: shape, f"{layer}.{form}": (), f"{layer}.input_scale": ()}
    source = _canonical(_Typed(file), FULL)
    assert {key: source.shape(key) for key in source.keys()} == shapes  # noqa: SIM118 - a source is not a mapping
    assert len(shapes) == 780


class _Typed(RecipeSource):
    """Ones, whose types follow from their keys."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes, lambda key, shape: torch.ones(shape), name="full size")

    def dtype(self, key: str) -> torch.dtype:
        if key.endswith("._data"):
            return torch.int8
        return torch.float8_e4m3fn if key.endswith(".weight") and len(self.shape(key)) == 2 else torch.float32


def test_a_source_without_scales_is_left_as_it_is() -> None:
    from uso_engine.weights.files.stored_scales import with_scales

    plain = MemorySource(WEIGHTS)
    assert with_scales(plain) is plain
