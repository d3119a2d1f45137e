"""Everything that is missing is told at once, before the first part is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from single_parts import BASE
from small_encoders import TINY
from typer.testing import CliRunner

import uso_engine.cli.compare
import uso_engine.cli.quantize  # noqa: F401  each adds its command
from uso_engine import USOEngine
from uso_engine.cli.app import app
from uso_engine.errors import MissingFileError


def test_a_bare_machine_is_told_all_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingFileError) as caught:
        USOEngine.from_config("uso-flux-dev", device="cpu")
    message = str(caught.value)
    assert "`uso-engine download uso-flux-dev`" in message
    for part in (
        "FLUX.1-dev:flux1-dev",
        "dit_lora",
        "projector",
        "siglip",
        "text_encoder_2",
        "tokenizer_2",
        "clip",
        "ae.",
        "nsfw",
    ):
        assert part in message
    assert message.count("\n") == 9


def test_all_that_folders_lack_is_told_at_once(tmp_path: Path) -> None:
    config = BASE
    for part in ("t5", "clip", "vision", "safety"):
        shutil.copytree(TINY / part, tmp_path / part)
        (tmp_path / part / "model.safetensors").unlink()
        section = getattr(config, part).model_copy(update={"folder": str(tmp_path / part)})
        config = config.model_copy(update={part: section})
    (tmp_path / "t5" / "tokenizer.json").unlink()
    (tmp_path / "vision" / "preprocessor_config.json").unlink()
    with pytest.raises(MissingFileError) as caught:
        USOEngine.from_config(config, device="cpu")
    for lacking in (
        "T5 text encoder weights",
        "T5 tokenizer",
        "CLIP text encoder weights",
        "vision encoder weights",
        "vision encoder's image processor",
        "safety checker weights",
    ):
        assert f"\n  - {lacking} in {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named", "not_named"),
    [
        (["quantize", "uso-flux-dev", "--tier", "int8"], ["flux1-dev", "dit_lora"], ["siglip", "ae."]),
        (["compare", "uso-flux-dev", "uso-flux-krea-dev"], ["flux1-dev", "flux1-krea-dev", "dit_lora", "siglip", "nsfw"], []),
    ],
    ids=["quantize", "compare"],
)
def test_other_commands_say_all_they_need(
    arguments: list[str], named: list[str], not_named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    printed = result.stdout + result.stderr
    assert result.exit_code == 1, printed
    assert [part for part in named if part not in printed] == []
    assert [part for part in not_named if part in printed] == []
    assert not (tmp_path / "out").exists()
