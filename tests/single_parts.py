"""Single parts of the embedded model, loaded from elsewhere as an engine loads them, for the tests of what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_encoders import TINY

from uso_engine.conditioning.text import TextEmbedding
from uso_engine.config import EngineConfig, load_config
from uso_engine.errors import USOError
from uso_engine.loading.assembly import load_autoencoder, load_safety_checker, load_style_encoder, load_text_encoders
from uso_engine.loading.lora_choice import choose_loras
from uso_engine.loading.presence import require_parts
from uso_engine.loading.transformer import load_transformer

BASE = load_config("uso-tiny")
SECRET = "root:x:0:0"
FOLDERS = {"t5": ["config.json", "tokenizer.json"], "clip": ["config.json", "tokenizer.json"]}
FOLDERS |= {name: ["config.json", "preprocessor_config.json"] for name in ("vision", "safety")}
FILES = {
    "transformer": "flux1-tiny.safetensors",
    "lora": "dit_lora.safetensors",
    "projector": "projector.safetensors",
    "autoencoder": "ae.safetensors",
    "embedding": "prompt.safetensors",
}


def with_path(part: str, path: Path) -> EngineConfig:
    """The embedded model with one of its parts elsewhere."""
    key = "checkpoint" if part in FILES else "folder"
    return BASE.model_copy(update={part: getattr(BASE, part).model_copy(update={key: str(path)})})


def load(part: str, path: Path) -> object:
    """Load one part as an engine does."""
    if part == "lora":
        return choose_loras([path], BASE).loras
    if part == "embedding":
        return TextEmbedding.load(path, token_width=64, pooled_width=64)
    config = with_path(part, path)
    require_parts(config)
    if part in ("t5", "clip"):
        return load_text_encoders(config, device="cpu", dtype=torch.float32)
    if part in ("vision", "projector"):
        return load_style_encoder(config, device="cpu", dtype=torch.float32)
    if part == "safety":
        return load_safety_checker(config, device="cpu")
    if part == "transformer":
        return load_transformer(config, device="cpu", tier="float32")
    assert config.autoencoder is not None
    return load_autoencoder(config.autoencoder, path, device="cpu")


def refusal(part: str, path: Path) -> USOError:
    with pytest.raises(USOError) as caught:
        load(part, path)
    message = str(caught.value)
    assert path.name in message
    assert SECRET not in message
    assert len(message) < 6_000
    return caught.value


def weights_of(part: str, folder: Path) -> Path:
    """A copy of a part's file."""
    path = folder / FILES[part]
    if part == "embedding":
        TextEmbedding(torch.zeros(5, 64), torch.zeros(64), "hash", "encoder").save(path)
    else:
        shutil.copy(TINY / FILES[part], path)
    return path
