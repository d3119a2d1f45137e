"""A transformer checkpoint reads the same whatever tool wrote it, and is refused in words when it is not the configured one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from narrow_model import NARROW, drawn_weights
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import diffusers_shapes
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

DEV = replace(NARROW, depth=2, depth_single_blocks=3)
SCHNELL = replace(DEV, guidance_embed=False)


def _diffusers_weights(params: TransformerParams) -> dict[str, Tensor]:
    """The weights under diffusers' keys, cut by hand rather than by the map under test."""
    c, weights = params.hidden_size, drawn_weights(params)
    result: dict[str, Tensor] = {}

    def take(ours: str, *theirs: str, sizes: tuple[int, ...] = ()) -> None:
        for leaf in ("weight", "bias"):
            parts = weights.pop(f"{ours}.{leaf}").split(sizes or (c * 99,)) if sizes else (weights.pop(f"{ours}.{leaf}"),)
            for name, part in zip(theirs, parts, strict=True):
                result[f"{name}.{leaf}"] = part.clone()

    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    take("final_layer.linear", "proj_out")
    for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        if f"{ours}.in_layer.weight" in weights:
            take(f"{ours}.in_layer", f"time_text_embed.{theirs}_embedder.linear_1")
            take(f"{ours}.out_layer", f"time_text_embed.{theirs}_embedder.linear_2")
    for leaf in ("weight", "bias"):
        shift, scale = weights.pop(f"final_layer.adaLN_modulation.1.{leaf}").chunk(2)
        result[f"norm_out.linear.{leaf}"] = torch.cat([scale, shift])
    for i in range(params.depth):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        take(f"{ours}.img_mod.lin", f"{theirs}.norm1.linear")
        take(f"{ours}.txt_mod.lin", f"{theirs}.norm1_context.linear")
        take(f"{ours}.img_attn.qkv", *(f"{theirs}.attn.to_{p}" for p in "qkv"), sizes=(c, c, c))
        take(f"{ours}.txt_attn.qkv", *(f"{theirs}.attn.add_{p}_proj" for p in "qkv"), sizes=(c, c, c))
        take(f"{ours}.img_attn.proj", f"{theirs}.attn.to_out.0")
        take(f"{ours}.txt_attn.proj", f"{theirs}.attn.to_add_out")
        take(f"{ours}.img_mlp.0", f"{theirs}.ff.net.0.proj")
        take(f"{ours}.img_mlp.2", f"{theirs}.ff.net.2")
        take(f"{ours}.txt_mlp.0", f"{theirs}.ff_context.net.0.proj")
        take(f"{ours}.txt_mlp.2", f"{theirs}.ff_context.net.2")
        for stream, added in (("img", ""), ("txt", "added_")):
            result[f"{theirs}.attn.norm_{added}q.weight"] = weights.pop(f"{ours}.{stream}_attn.norm.query_norm.scale")
            result[f"{theirs}.attn.norm_{added}k.weight"] = weights.pop(f"{ours}.{stream}_attn.norm.key_norm.scale")
    for i in range(params.depth_single_blocks):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        names = (*(f"{theirs}.attn.to_{p}" for p in "qkv"), f"{theirs}.proj_mlp")
        take(f"{ours}.linear1", *names, sizes=(c, c, c, params.mlp_width))
        take(f"{ours}.linear2", f"{theirs}.proj_out")
        take(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
        result[f"{theirs}.attn.norm_q.weight"] = weights.pop(f"{ours}.norm.query_norm.scale")
        result[f"{theirs}.attn.norm_k.weight"] = weights.pop(f"{ours}.norm.key_norm.scale")
    assert not weights
    return result


def _diffusers_model(params: TransformerParams) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.head_dim,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=params.axes_dim,
    )


def _assert_canonical(source: TensorSource, params: TransformerParams, dtype: torch.dtype = torch.float32) -> None:
    expected = drawn_weights(params)
    assert set(source.keys()) == set(expected)
    for key, tensor in expected.items():
        assert source.shape(key) == tuple(tensor.shape)
        assert source.dtype(key) == dtype
        assert torch.equal(source.read(key).float(), tensor.to(dtype).float()), key
    source.close()


@pytest.mark.parametrize("params", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_single_files_of_black_forest_labs_and_comfyui(params: TransformerParams, prefix: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f.safetensors", {prefix + key: tensor for key, tensor in drawn_weights(params).items()})
    _assert_canonical(open_transformer_checkpoint(tmp_path / "f.safetensors", params), params)


def test_a_comfyui_file_with_all_components_in_plain_fp8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {f"model.diffusion_model.{key}": tensor.to(torch.float8_e4m3fn) for key, tensor in drawn_weights(DEV).items()}
    tensors |= {"vae.decoder.conv_in.bias": torch.ones(1), "text_encoders.clip_l.logit_scale": torch.ones(1)}
    write_safetensors(tmp_path / "f.safetensors", tensors)
    with caplog.at_level(logging.INFO):
        source = open_transformer_checkpoint(tmp_path / "f.safetensors", DEV)
    assert "2 keys of other components" in caplog.text
    _assert_canonical(source, DEV, torch.float8_e4m3fn)


@pytest.mark.parametrize("params", [DEV, SCHNELL], ids=["dev", "schnell"])
@pytest.mark.parametrize("layout", ["file", "folder", "shards", "pipeline", "prefixed"])
def test_diffusers_checkpoints(params: TransformerParams, layout: str, tmp_path: Path) -> None:
    model = _diffusers_model(params)
    weights = _diffusers_weights(params)
    model.load_state_dict(weights)  # strict: diffusers agrees that these are its keys and shapes
    path = tmp_path
    if layout == "file":
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        model.save_pretrained(tmp_path)
    elif layout == "folder":
        model.save_pretrained(tmp_path)
    elif layout == "shards":
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif layout == "pipeline":
        model.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
        (tmp_path / "flux1-dev.safetensors").write_bytes(b"")
    else:
        path = tmp_path / "f.safetensors"
        write_safetensors(path, {f"transformer.{key}": tensor for key, tensor in weights.items()})
    _assert_canonical(open_transformer_checkpoint(path, params), params)


def test_pieces_stored_in_different_types_meet_in_float32(tmp_path: Path) -> None:
    weights = _diffusers_weights(DEV)
    weights["transformer_blocks.0.attn.to_k.weight"] = weights["transformer_blocks.0.attn.to_k.weight"].bfloat16()
    write_safetensors(tmp_path / "f.safetensors", weights)
    fused = open_transformer_checkpoint(tmp_path / "f.safetensors", DEV).read("double_blocks.0.img_attn.qkv.weight")
    expected = drawn_weights(DEV)["double_blocks.0.img_attn.qkv.weight"]
    expected[32:64] = expected[32:64].bfloat16().float()
    assert torch.equal(fused, expected)


def _refusal(path: Path, params: TransformerParams, weights: Mapping[str, Tensor]) -> str:
    write_safetensors(path, weights)
    with pytest.raises(CheckpointError) as caught:
        open_transformer_checkpoint(path, params)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "f.safetensors"


def test_every_key_at_fault_is_listed_at_once(file: Path) -> None:
    weights = drawn_weights(DEV)
    del weights["txt_in.bias"], weights["single_blocks.1.linear2.weight"]
    weights["extra.weight"] = torch.ones(1)
    weights["img_in.bias"] = torch.ones(5)
    message = _refusal(file, DEV, weights)
    assert "2 keys missing: txt_in.bias, single_blocks.1.linear2.weight" in message
    assert "1 key left over: extra.weight" in message
    assert "1 key of shape [5], expected [32]: img_in.bias" in message


def test_a_missing_diffusers_key_is_named_as_the_file_would_name_it(file: Path) -> None:
    weights = _diffusers_weights(DEV)
    del weights["single_transformer_blocks.2.attn.to_k.weight"]
    assert "1 key missing: single_transformer_blocks.2.attn.to_k.weight" in _refusal(file, DEV, weights)


def test_many_keys_are_summed_up_by_pattern(file: Path) -> None:
    message = _refusal(file, replace(DEV, depth=19, depth_single_blocks=38), drawn_weights(DEV))
    assert "double_blocks.{2-18}.img_attn.qkv.weight (17)" in message
    assert "the checkpoint has 2 double blocks (depth), the configuration says 19" in message
    assert "the checkpoint has 3 single blocks (depth_single_blocks), the configuration says 38" in message
    assert len(message) < 4000


def test_another_variant_is_explained(file: Path) -> None:
    assert "has a guidance embedding (like FLUX.1-dev, Krea-dev), the configuration" in _refusal(
        file, SCHNELL, drawn_weights(DEV)
    )
    assert "has no guidance embedding (like FLUX.1-schnell), the configuration" in _refusal(file, DEV, drawn_weights(SCHNELL))
    assert "has a guidance embedding" in _refusal(file, SCHNELL, _diffusers_weights(DEV))
    fill = drawn_weights(replace(DEV, in_channels=48))
    assert "has 48 input channels (in_channels), the configuration says 8" in _refusal(file, DEV, fill)
    wide = drawn_weights(replace(DEV, hidden_size=64, axes_dim=(8, 12, 12)))
    assert "has 64 rows in the input layer (hidden_size), the configuration says 32" in _refusal(file, DEV, wide)


def test_quantised_checkpoints_are_recognised(file: Path) -> None:
    weights = drawn_weights(DEV)
    packed = {"img_in.weight": torch.ones(128, 1, dtype=torch.uint8), "img_in.weight.absmax": torch.ones(2)}
    assert "bitsandbytes" in _refusal(file, DEV, weights | packed)
    integers = {"img_in.weight": torch.ones(32, 8, dtype=torch.uint8)}
    assert "1 key of another type than floating point: img_in.weight" in _refusal(file, DEV, weights | integers)


def test_other_files_are_recognised(file: Path) -> None:
    assert "is not a FLUX transformer" in _refusal(file, DEV, {"a": torch.ones(1)})
    assert "looks like a LoRA" in _refusal(file, DEV, {"lora_unet_x.lora_down.weight": torch.ones(1)})
    assert "looks like an autoencoder" in _refusal(file, DEV, {"encoder.down.0.block.0.conv1.bias": torch.ones(1)})
    assert "found 0 keys: none" in _refusal(file, DEV, {})
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in drawn_weights(DEV).items()}
    assert "1 key left over beside" in _refusal(file, DEV, prefixed | {"strange": torch.ones(1)})


def _shards(folder: Path, count: int = 3) -> list[Path]:
    weights = list(drawn_weights(DEV).items())
    files = [folder / f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for n, path in enumerate(files):
        write_safetensors(path, dict(weights[n::count]))
    index = {key: files[n % count].name for n, (key, _) in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return files


def test_shards_with_their_index_or_without_it(tmp_path: Path) -> None:
    _shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    _assert_canonical(open_transformer_checkpoint(index, DEV), DEV)
    _assert_canonical(open_transformer_checkpoint(tmp_path, DEV), DEV)
    index.unlink()
    _assert_canonical(open_transformer_checkpoint(tmp_path, DEV), DEV)


def test_a_missing_shard_is_named_with_and_without_index(tmp_path: Path) -> None:
    _shards(tmp_path)[1].unlink()
    for _ in range(2):
        with pytest.raises(MissingFileError, match=r"1 of 3 shards are missing: model-00002-of-00003.safetensors"):
            open_transformer_checkpoint(tmp_path, DEV)
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)


def test_shards_that_do_not_fit_their_index_or_each_other(tmp_path: Path) -> None:
    files = _shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["img_in.weight"]
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"ghost": files[0].name}}))
    with pytest.raises(CheckpointError, match=r"(?s)in no shard: ghost.*not in the index: img_in.weight"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"expected names of .safetensors files beside it"):
        open_checkpoint(tmp_path)
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index"):
            open_checkpoint(tmp_path)
    index.unlink()
    write_safetensors(files[0], {"img_in.bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"more than one of its files holds img_in.bias"):
        open_checkpoint(tmp_path)


def test_folders_without_or_with_several_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file or folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(MissingFileError, match=r"no .safetensors file in this folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(MissingFileError, match=r"pytorch_model.bin would be pickles"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"name the one you want: a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be opened"):
        open_checkpoint(tmp_path / ("x" * 5000))


def test_diffusers_own_keys_at_another_size() -> None:
    with torch.device("meta"):
        model = _diffusers_model(DEV)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == diffusers_shapes(DEV)
