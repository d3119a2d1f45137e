"""Encoders from single files give the same bits as from their folders, whatever form the file has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, SiglipVisionConfig, T5Config

from uso_engine.conditioning.encoder_sizes import clip_config, siglip_config, t5_config
from uso_engine.conditioning.style import StyleEncoder
from uso_engine.conditioning.text import TextEncoders
from uso_engine.conditioning.tokenizer_folders import find_tokenizer
from uso_engine.config import load_config
from uso_engine.embedded.build import FOLDER
from uso_engine.engine import USOEngine
from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.recipe import draw, recipe_source

PROMPT = "a house by the sea"
IN_ALL = {"t5": "text_encoders.t5xxl.transformer.", "clip": "text_encoders.clip_l.transformer."}


def _weights(part: str) -> dict[str, Tensor]:
    source = SafetensorsSource(FOLDER / part / "model.safetensors")
    try:
        return {key: source.read(key) for key in source.keys()}  # noqa: SIM118 - a source is not a mapping
    finally:
        source.close()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    write_safetensors(path, tensors)
    return path


def _encoders(t5: Path, clip: Path = FOLDER / "clip") -> TextEncoders:
    return TextEncoders.from_folders(
        t5,
        clip,
        t5_tokenizer=FOLDER / "t5",
        clip_tokenizer=FOLDER / "clip",
        t5_max_length=20,
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def from_folders() -> TextEncoders:
    return _encoders(FOLDER / "t5")


def _assert_same(encoders: TextEncoders, truth: TextEncoders) -> None:
    assert encoders.identity == truth.identity
    found, expected = encoders.encode(PROMPT), truth.encode(PROMPT)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)


def test_files_of_their_own(from_folders: TextEncoders, tmp_path: Path) -> None:
    t5 = _write(tmp_path / "t5xxl_fp16.safetensors", _weights("t5"))
    clip = _write(tmp_path / "clip_l.safetensors", _weights("clip"))
    _assert_same(_encoders(t5, clip), from_folders)


def test_the_encoders_of_an_all_in_one_checkpoint(from_folders: TextEncoders, tmp_path: Path) -> None:
    tensors = {f"{prefix}{key}": value for part, prefix in IN_ALL.items() for key, value in _weights(part).items()}
    tensors |= {"model.diffusion_model.img_in.bias": torch.ones(2), "text_encoders.clip_l.logit_scale": torch.ones(())}
    tensors |= {f"{IN_ALL['clip']}text_projection.weight": torch.ones(64, 64)}
    path = _write(tmp_path / "flux1-dev.safetensors", tensors)
    _assert_same(_encoders(path, path), from_folders)


def test_a_whole_t5_and_a_table_under_the_encoders_name(from_folders: TextEncoders, tmp_path: Path) -> None:
    weights = _weights("t5")
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    whole = weights | {"decoder.final_layer_norm.weight": torch.ones(64), "lm_head.weight": torch.ones(2, 2)}
    _assert_same(_encoders(_write(tmp_path / "t5.safetensors", whole)), from_folders)


@pytest.mark.parametrize("form", ["plain", "scaled"])
def test_t5_in_fp8_alone_and_in_an_all_in_one(form: str, tmp_path: Path) -> None:
    """The embeddings are those of a folder with the weights that the file means."""
    tensors: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for key, value in _weights("t5").items():
        if value.ndim != 2 or "block" not in key or "bias" in key:
            tensors[key] = meant[key] = value
            continue
        scale = value.double().abs().max() / 448 if form == "scaled" else torch.ones((), dtype=torch.float64)
        tensors[key] = (value.double() / scale).to(torch.float8_e4m3fn)
        meant[key] = (tensors[key].double() * scale.float().double()).float()
        if form == "scaled":
            tensors[key.replace(".weight", ".scale_weight")] = scale.float()
    if form == "scaled":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    shutil.copytree(FOLDER / "t5", tmp_path / "t5")
    write_safetensors(tmp_path / "t5" / "model.safetensors", meant, {"format": "pt"})
    truth = _encoders(tmp_path / "t5").encode(PROMPT).tokens
    alone = _write(tmp_path / "t5xxl_fp8.safetensors", tensors)
    in_all = _write(tmp_path / "all.safetensors", {IN_ALL["t5"] + key: value for key, value in tensors.items()})
    for path in (alone, in_all):
        assert torch.allclose(_encoders(path).encode(PROMPT).tokens, truth, atol=1e-5)


def test_t5_as_gguf(from_folders: TextEncoders, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf library: pip install 'uso-engine[gguf]'")
    names = {
        "shared": "token_embd",
        "encoder.final_layer_norm": "enc.output_norm",
        "layer.0.layer_norm": "attn_norm",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.1.layer_norm": "ffn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
        "encoder.block": "enc.blk",
    } | {f"layer.0.SelfAttention.{part}": f"attn_{part}" for part in "qkvo"}
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for key, value in _weights("t5").items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        writer.add_tensor(key, value.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _assert_same(_encoders(tmp_path / "t5.gguf"), from_folders)


def _projector() -> StyleProjector:
    section = load_config("uso-tiny").projector
    assert section is not None
    projector = StyleProjector(section.vision_tokens, section.vision_width, section.style_tokens, 64)
    projector.load_state_dict({key: draw(key, value.shape) for key, value in projector.state_dict().items()})
    return projector


def test_siglip_with_its_preprocessing_built_in(tmp_path: Path) -> None:
    path = _write(tmp_path / "sigclip_vision_patch14_384.safetensors", _weights("vision"))
    projector = _projector()
    image = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")
    tokens = [StyleEncoder.from_folder(place, projector).encode(image).tokens for place in (path, FOLDER / "vision")]
    assert torch.equal(*tokens)


def test_tokenizers_of_a_comfyui_installation_are_found(from_folders: TextEncoders, tmp_path: Path) -> None:
    file = tmp_path / "ComfyUI" / "models" / "text_encoders" / "flux" / "t5.safetensors"
    file.parent.mkdir(parents=True)
    _write(file, _weights("t5"))
    shutil.copytree(FOLDER / "t5", tmp_path / "ComfyUI" / "comfy" / "text_encoders" / "t5_tokenizer")
    shutil.copytree(FOLDER / "clip", tmp_path / "ComfyUI" / "comfy" / "sd1_tokenizer")
    assert find_tokenizer("CLIP", file) == tmp_path / "ComfyUI" / "comfy" / "sd1_tokenizer"
    clip = _write(file.with_name("clip_l.safetensors"), _weights("clip"))
    encoders = TextEncoders.from_folders(file, clip, t5_max_length=20, dtype=torch.float32)
    _assert_same(encoders, from_folders)
    link = tmp_path / "elsewhere.safetensors"
    link.symlink_to(file)
    assert find_tokenizer("T5", link) == tmp_path / "ComfyUI" / "comfy" / "text_encoders" / "t5_tokenizer"


@pytest.mark.parametrize(("encoder", "needed"), [("T5", "spiece.model"), ("CLIP", "vocab.json and merges.txt")])
def test_tokenizers_that_are_nowhere_are_asked_for(
    encoder: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingFileError, match=rf"download --tokenizers.*{needed}"):
        find_tokenizer(encoder, tmp_path / "x.safetensors")


def test_a_missing_tokenizer_is_among_the_missing_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = (FOLDER.parent.parent.parent / "configs" / "uso-tiny.toml").read_text()
    _write(tmp_path / "t5.safetensors", _weights("t5"))
    for part, file in (("t5", "t5.safetensors"), ("vision", "none.safetensors")):
        text = text.replace(f'"embedded:uso-tiny/{part}"', f'"{file}"')
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(MissingFileError, match=r"(?s)none\.safetensors was not found.*T5 tokenizer: a single file"):
        USOEngine.from_config(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared.weight": None}, "shared.weight is missing, which says how large the model is"),
        ({"encoder.block.1.layer.0.SelfAttention.q.weight": None}, r"1 key missing: encoder\.block\.1"),
        ({"encoder.block.1.layer.0.SelfAttention.q.weight": torch.ones(64, 63)}, r"shape \[64, 63\], expected \[64, 64\]"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": None}, "found none"),
        ({"extra": torch.ones(1)}, "1 key left over: extra"),
        ({"encoder.final_layer_norm.weight": torch.full((64,), torch.nan)}, "infinite or not a number"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight.absmax": torch.ones(1)}, "quantised as bitsandbytes"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 5)}, "no multiple of its 5"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(change: Mapping[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {key: value for key, value in {**_weights("t5"), **change}.items() if value is not None}
    path = _write(tmp_path / "t5.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        _encoders(path)
    assert str(path) in str(caught.value)


def test_other_towers_are_recognised(tmp_path: Path) -> None:
    clip_vision = _weights("vision") | {"vision_model.embeddings.class_embedding": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"this is CLIP's vision tower; USO's style projector reads SigLIP"):
        StyleEncoder.from_folder(_write(tmp_path / "v.safetensors", clip_vision), _projector())
    wide = {key: torch.ones(72, 72) for key in _weights("clip")}
    with pytest.raises(CheckpointError, match="no CLIP text model of width 72 is known"):
        _encoders(FOLDER / "t5", _write(tmp_path / "c.safetensors", wide))


FULL = {
    "t5": T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    ),
    "clip": CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    ),
    "siglip": SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
    ),
}


@pytest.mark.parametrize("part", FULL)
def test_the_published_sizes_are_found_from_their_shapes(part: str) -> None:
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel

    classes = {"t5": T5EncoderModel, "clip": CLIPTextModel, "siglip": SiglipVisionModel}
    with torch.device("meta"):
        state = classes[part](FULL[part]).state_dict()
    outer = {"t5": "", "clip": "text_model.", "siglip": "vision_model."}[part]
    shapes = {key if key.startswith(outer) else outer + key: tuple(value.shape) for key, value in state.items()}
    found = {"t5": t5_config, "clip": clip_config, "siglip": siglip_config}[part](recipe_source(shapes))
    decisive = (
        ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets", "dense_act_fn")
        if part == "t5"
        else ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "hidden_act")
    )
    beside = {"t5": (), "clip": ("vocab_size", "max_position_embeddings"), "siglip": ("image_size", "patch_size")}[part]
    for name in (*decisive, *beside):
        assert getattr(found, name) == getattr(FULL[part], name), name
