"""A ComfyUI folder as its USO tutorial asks for it becomes a configuration that generates; `check` says what does not fit."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from command_line import run
from torch import Tensor

from uso_engine import USOEngine
from uso_engine.config import EngineConfig, load_config
from uso_engine.embedded.build import FOLDER
from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.loading.comfyui_folder import configuration_from, find_in_comfyui, find_in_diffusers
from uso_engine.loading.configuration_text import configuration_text
from uso_engine.loading.examination import examine
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors

TINY = load_config("uso-tiny")
SIZE = {"width": 64, "height": 64}


def _tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    source = SafetensorsSource(path)
    try:
        return {prefix + key: source.read(key) for key in source.keys()}  # noqa: SIM118 - a source is not a mapping
    finally:
        source.close()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors)
    return path


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's four files: an all-in-one checkpoint, the LoRA, the projector and one SigLIP file."""
    root = tmp_path_factory.mktemp("ComfyUI")
    everything = _tensors(FOLDER / "flux1-tiny.safetensors", "model.diffusion_model.")
    everything |= _tensors(FOLDER / "clip/model.safetensors", "text_encoders.clip_l.transformer.")
    everything |= _tensors(FOLDER / "t5/model.safetensors", "text_encoders.t5xxl.transformer.")
    everything |= _tensors(FOLDER / "ae.safetensors", "vae.") | {"model_ema.decay": torch.ones(1)}
    models = root / "models"
    _write(models / "checkpoints" / "flux1-dev-fp8.safetensors", everything)
    _write(models / "loras" / "uso-flux1-dit-lora-v1.safetensors", _tensors(FOLDER / "dit_lora.safetensors"))
    _write(models / "loras" / "ink.safetensors", _tensors(FOLDER / "dit_lora.safetensors"))
    _write(models / "model_patches" / "uso-flux1-projector-v1.safetensors", _tensors(FOLDER / "projector.safetensors"))
    _write(models / "clip_vision" / "sigclip_vision_patch14_384.safetensors", _tensors(FOLDER / "vision/model.safetensors"))
    shutil.copytree(FOLDER / "t5", root / "comfy" / "text_encoders" / "t5_tokenizer")
    shutil.copytree(FOLDER / "clip", root / "comfy" / "sd1_tokenizer")
    return root


def _written(config: EngineConfig, folder: Path) -> EngineConfig:
    (folder / "my.toml").write_text(configuration_text(config, "a test"), encoding="utf-8")
    return load_config(folder / "my.toml")


@pytest.mark.parametrize("start", ["", "models"])
def test_the_tutorials_folder_generates_what_the_embedded_files_do(start: str, comfyui: Path, tmp_path: Path) -> None:
    found = find_in_comfyui(comfyui / start, TINY)
    assert found.missing == {}
    assert found.chosen["transformer checkpoint"].path.name == "flux1-dev-fp8.safetensors"
    assert found.chosen["LoRA"].path.name == "uso-flux1-dit-lora-v1.safetensors"
    assert [path.name for path in found.loras] == ["ink.safetensors"]
    config = _written(configuration_from(found, TINY), tmp_path)
    assert all(entry.facts is not None for entry in examine(config))
    pictures = []
    for one in (config, TINY):
        with USOEngine.from_config(one) as engine:
            style = torch.linspace(0, 1, 3 * 64 * 64).reshape(3, 64, 64)
            result = engine.generate("a house", images=[None, style], image_size=SIZE, num_inference_steps=2, seed=3)
            pictures.append(result.images[0].tobytes())
    assert pictures[0] == pictures[1]


def test_the_least_quantised_of_several_files_is_taken_and_the_others_are_named(comfyui: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    weights = _tensors(FOLDER / "flux1-tiny.safetensors")
    fp8 = {key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}
    _write(root / "diffusion_models" / "a-fp8.safetensors", fp8)
    _write(root / "unet" / "z-bf16.safetensors", weights)
    _write(root / "unet" / "schnell.safetensors", {key: v for key, v in weights.items() if "guidance_in" not in key})
    (root / "unet" / "broken.safetensors").write_bytes(b"")
    found = find_in_comfyui(root, TINY)
    assert found.chosen["transformer checkpoint"].path.name == "z-bf16.safetensors"
    assert [path.name for path in found.others["transformer checkpoint"]] == ["a-fp8.safetensors"]
    assert set(found.missing) >= {"LoRA", "style projector", "T5 text encoder"}


def test_links_and_extra_paths_are_followed(comfyui: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(comfyui / "models" / "loras", elsewhere / "L")
    root = tmp_path / "ComfyUI"
    (root / "models").mkdir(parents=True)
    (root / "models" / "checkpoints").symlink_to(comfyui / "models" / "checkpoints")
    (comfyui / "models" / "checkpoints" / "loop").symlink_to(comfyui / "models" / "checkpoints")
    (root / "models" / "clip_vision").mkdir()
    (root / "models" / "clip_vision" / "linked").symlink_to(comfyui / "models" / "clip_vision")
    (root / "extra_model_paths.yaml").write_text(
        f"other:\n  base_path: {elsewhere}\n  loras: |\n    none/\n    L/\n  controlnet: x\ntext: 3\n"
    )
    found = find_in_comfyui(root, TINY)
    assert found.chosen["LoRA"].path.parent == elsewhere / "L"
    assert found.chosen["vision encoder"].path.parent.name == "linked"
    assert found.chosen["transformer checkpoint"].path == root / "models" / "checkpoints" / "flux1-dev-fp8.safetensors"
    (root / "extra_model_paths.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"extra_model_paths\.yaml: cannot be read"):
        find_in_comfyui(root, TINY)


def test_folders_that_are_none_of_comfyuis(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no such folder"):
        find_in_comfyui(tmp_path / "none", TINY)
    with pytest.raises(MissingFileError, match="none of ComfyUI's folders is in it"):
        find_in_comfyui(tmp_path, TINY)
    with pytest.raises(MissingFileError, match="expected a pipeline of diffusers"):
        find_in_diffusers(tmp_path, TINY)


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    root = tmp_path / "FLUX.1-dev"
    for name, own in (("text_encoder", "clip"), ("tokenizer", "clip"), ("text_encoder_2", "t5"), ("tokenizer_2", "t5")):
        shutil.copytree(FOLDER / own, root / name)
    _write(root / "transformer" / "diffusion_pytorch_model.safetensors", _tensors(FOLDER / "flux1-tiny.safetensors"))
    _write(root / "vae" / "diffusion_pytorch_model.safetensors", _tensors(FOLDER / "ae.safetensors"))
    config = _written(configuration_from(find_in_diffusers(root, TINY), TINY), tmp_path)
    assert config.t5 is not None and config.t5.tokenizer == str(root / "tokenizer_2")
    assert config.loras == TINY.loras
    assert all(entry.facts is not None for entry in examine(config))
    with USOEngine.from_config(config) as engine:
        assert engine.generate("a house", image_size=SIZE, num_inference_steps=1, seed=3).images


def test_a_configuration_is_written_as_it_is_read(tmp_path: Path) -> None:
    for name in ("uso-tiny", "uso-flux-dev-int4"):
        config = load_config(name)
        assert _written(config, tmp_path).model_copy(update={"base_folder": config.base_folder}) == config
    odd = TINY.model_copy(update={"description": 'quotes " and \\ and \x7f and ü and\nlines'})
    assert _written(odd, tmp_path).description == odd.description
    assert "params" not in tomllib.loads(configuration_text(load_config("uso-flux-dev"), "x"))["transformer"]


def test_the_commands(comfyui: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.toml"
    made = run("config", "from-comfyui", str(comfyui), "--base", "uso-tiny", "--out", str(out))
    assert made[0] == 0
    assert "another LoRA, not merged:" in made[1] and "GiB in memory" in made[1]
    ready = run("check", str(out))
    assert ready[0] == 0 and "my is complete" in ready[1]
    text = out.read_text().replace("uso-flux1-dit-lora-v1", "none").replace("sigclip_vision", "other")
    out.write_text(text)
    code, said = run("check", str(out))
    assert code == 1
    assert "LoRA:" in said and "vision encoder:" in said and "2 parts of my are missing or do not fit" in said
