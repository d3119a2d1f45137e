"""The autoencoder from the authors' file and from diffusers' folder computes what the authors' code computes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.verification.measure import relative_error
from uso_engine.weights.autoencoder_checkpoint import load_autoencoder
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.recipe import recipe_source

# pixels, latent and decoded were computed in float32 on a CPU by the USO authors' AutoEncoder (bytedance/USO, b6784d7) with
# reg.sample = False, filled by load_state_dict from draw("ae." + key, shape, salt) and fed torch.rand(1, 3, 40, 24) * 2 - 1
# from a generator with seed 5; ``ae`` in the file's metadata has its sizes.
CASE = Path(__file__).parent / "data" / "autoencoder_three_levels.safetensors"


@pytest.fixture(scope="module")
def case() -> tuple[AutoencoderParams, str, dict[str, Tensor]]:
    with safe_open(CASE, "pt") as file:
        sizes = json.loads(file.metadata()["ae"])
        params = AutoencoderParams(**(sizes | {"ch_mult": tuple(sizes["ch_mult"])}))
        return params, file.metadata()["salt"], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _tensors(params: AutoencoderParams, salt: str) -> dict[str, Tensor]:
    source = recipe_source(autoencoder_shapes(params), salt=salt, draw_prefix="ae.")
    return {key: source.read(key) for key in source.keys()}  # noqa: SIM118


@torch.no_grad()
def _assert_computes(module: AutoencoderKL, tensors: dict[str, Tensor]) -> None:
    config = module.config
    latent = config.scaling_factor * (module.encode(tensors["pixels"]).latent_dist.mean - config.shift_factor)
    decoded = module.decode(tensors["latent"] / config.scaling_factor + config.shift_factor).sample
    for ours, theirs in ((latent, tensors["latent"]), (decoded, tensors["decoded"])):
        assert relative_error(ours, theirs) < 5e-6


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_the_authors_file_gives_the_authors_numbers(
    prefix: str, case: tuple[AutoencoderParams, str, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params, salt, tensors = case
    weights = {prefix + key: tensor for key, tensor in _tensors(params, salt).items()}
    if prefix:
        weights["model.diffusion_model.img_in.bias"] = torch.ones(1)
    write_safetensors(tmp_path / "ae.safetensors", weights)
    with caplog.at_level(logging.INFO):
        module = load_autoencoder(tmp_path / "ae.safetensors", params)
    assert ("1 keys of other components" in caplog.text) == bool(prefix)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    if prefix:  # the same bits compute the same; once is enough
        plain = tmp_path / "plain.safetensors"
        write_safetensors(plain, _tensors(params, salt))
        expected = load_autoencoder(plain, params).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in module.state_dict().items())
    else:
        _assert_computes(module, tensors)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_diffusers_folder_gives_the_authors_numbers(
    subfolder: str, case: tuple[AutoencoderParams, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    params, salt, tensors = case
    write_safetensors(tmp_path / "ae.safetensors", _tensors(params, salt))
    load_autoencoder(tmp_path / "ae.safetensors", params).save_pretrained(tmp_path / "repo" / subfolder)
    _assert_computes(load_autoencoder(tmp_path / "repo", params), tensors)
    with pytest.raises(CheckpointError, match=r"scaling_factor is 0\.7 there, the configuration says scale_factor = 0\.5"):
        load_autoencoder(tmp_path / "repo", replace(params, scale_factor=0.5))
    (tmp_path / "repo" / subfolder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_autoencoder(tmp_path / "repo", params)


def test_every_key_at_fault_is_listed(case: tuple[AutoencoderParams, str, dict[str, Tensor]], tmp_path: Path) -> None:
    params, salt, _ = case
    path = tmp_path / "ae.safetensors"
    weights = _tensors(params, salt)
    del weights["encoder.mid.attn_1.q.bias"]
    weights |= {"quant_conv.weight": torch.ones(1), "decoder.conv_out.bias": torch.ones(4)}
    write_safetensors(path, weights)
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(path, params)
    for expected in (
        "1 key missing: encoder.mid.attn_1.q.bias",
        "1 key left over: quant_conv.weight",
        "1 key of shape [4], expected [3]: decoder.conv_out.bias",
    ):
        assert expected in str(caught.value)


def test_values_that_are_no_numbers_missing_files_and_impossible_sizes(
    case: tuple[AutoencoderParams, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    params, salt, _ = case
    weights = _tensors(params, salt)
    weights["decoder.mid.attn_1.v.weight"][0, 0] = torch.nan
    write_safetensors(tmp_path / "ae.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"decoder\.mid_block\.attentions\.0\.to_v\.weight holds values"):
        load_autoencoder(tmp_path / "ae.safetensors", params)
    with pytest.raises(MissingFileError):
        load_autoencoder(tmp_path / "none.safetensors", params)
    for wrong in ({"ch": 48}, {"ch_mult": ()}, {"z_channels": 0}, {"scale_factor": 0.0}):
        with pytest.raises(ValueError, match=r"must be|at least"):
            AutoencoderParams(**wrong)
