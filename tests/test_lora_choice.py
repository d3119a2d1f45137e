"""LoRAs that a caller or a shell names: from where they stand, with or without a weight, and what is no list of LoRAs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uso_engine import USOEngine
from uso_engine.config import load_config
from uso_engine.errors import LoRAError, MissingFileError
from uso_engine.loading.lora_choice import choose_loras

BASE = load_config("uso-tiny")
LAYER = "double_blocks.0.img_attn.proj"
KEY = f"{LAYER}.weight"


def write_lora(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pair = {f"{LAYER}.lora_A.weight": torch.full((2, 192), value), f"{LAYER}.lora_B.weight": torch.full((192, 2), 0.01)}
    save_file(pair, path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a caller stands in, which is not the configuration's."""
    folder = tmp_path / "here"
    write_lora(folder / "turbo.safetensors")
    write_lora(folder / "loras" / "ink.safetensors")
    write_lora(tmp_path / "home" / "mine.safetensors")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def weight(engine: USOEngine) -> torch.Tensor:
    return engine.pipeline.transformer.get_parameter(KEY).clone()


def test_what_is_named_from_where_the_caller_stands_is_merged(engine: USOEngine, here: Path) -> None:
    before = weight(engine)
    engine.set_loras([("turbo.safetensors", 0.5)])
    assert torch.allclose(weight(engine) - before, torch.full_like(before, 0.5 * 2 * 0.01), atol=1e-6)
    engine.set_loras(["turbo.safetensors", (Path("loras") / "ink.safetensors", 0.5)])
    assert torch.allclose(weight(engine) - before, torch.full_like(before, 1.5 * 2 * 0.01), atol=1e-6)
    engine.set_loras([])
    assert torch.equal(weight(engine), before)


@pytest.mark.parametrize(
    "path",
    [
        "turbo.safetensors",
        "./turbo.safetensors",
        "../here/turbo.safetensors",
        "loras/ink.safetensors",
        "loras",
        "~/mine.safetensors",
        Path("turbo.safetensors"),
        Path("loras/ink.safetensors"),
        Path("~/mine.safetensors"),
        "embedded:uso-tiny/dit_lora.safetensors",
    ],
)
def test_ways_to_name_a_file(path: str | Path, here: Path) -> None:
    for named in (path, Path.cwd() / path if not str(path).startswith(("~", "embedded")) else path):
        ((lora, strength),) = choose_loras([named], BASE).loras
        assert strength == 1.0
        assert lora.updates


def test_a_configuration_names_from_its_own_folder(here: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "beside" / "own.safetensors")
    text = "[transformer]\ncheckpoint = 'a'\n[[loras]]\npath = 'own.safetensors'\n"
    (tmp_path / "beside" / "c.toml").write_text(text, encoding="utf-8")
    config = load_config("../beside/c.toml")
    with pytest.raises(MissingFileError, match=r"LoRA: own\.safetensors was not found; looked at .*/here/own\.safetensors; "):
        choose_loras(["own.safetensors"], config)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("absent.safetensors", "correct the path, or name a hub id"),
        ("loras/absent.safetensors", "correct the path, or name a hub id"),
        (Path("org/name"), "correct the path, or name a hub id"),
        ("org/name:file.safetensors", "download it with `hf download org/name`"),
    ],
)
def test_the_advice_fits_what_was_named(path: str | Path, advice: str, here: Path) -> None:
    with pytest.raises(MissingFileError, match=advice):
        choose_loras([path], BASE)


@pytest.mark.parametrize(
    "loras",
    [
        "turbo.safetensors",
        Path("turbo.safetensors"),
        b"turbo.safetensors",
        3,
        None,
        [3],
        [None],
        [("turbo.safetensors",)],
        [("turbo.safetensors", 1.0, 2.0)],
        [(1.0, "turbo.safetensors")],
        [{"path": "turbo.safetensors"}],
        [b"turbo.safetensors"],
        {"turbo.safetensors": 0.5},
    ],
    ids=str,
)
def test_what_is_no_list_of_loras(engine: USOEngine, loras: object, here: Path) -> None:
    with pytest.raises(ValueError, match="loras must be a list of paths or of"):
        engine.set_loras(loras)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", ["0.8", True, None, float("nan"), float("inf"), 10**400, [1.0]], ids=lambda v: str(v)[:8])
def test_weights_are_finite_numbers(engine: USOEngine, strength: float, here: Path) -> None:
    with pytest.raises(ValueError, match=r"the weight of 'turbo\.safetensors' must be a finite number, got"):
        engine.set_loras([("turbo.safetensors", strength)])
    assert choose_loras([("turbo.safetensors", np.float32(0.5))], BASE).loras[0][1] == 0.5  # type: ignore[list-item]


def test_a_text_file_is_not_quoted(engine: USOEngine, here: Path) -> None:
    (here / "notes.txt").write_text("root:x:0:0:root:/root:/bin/bash\n")
    with pytest.raises(LoRAError, match="expected a safetensors file, but this is text") as caught:
        engine.set_loras(["notes.txt"])
    assert "root:x" not in str(caught.value)
