import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from uso_engine.conditioning.content import Autoencoder
from uso_engine.verification.measure import relative_error
from uso_engine.weights.autoencoder_checkpoint import load_autoencoder
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.recipe import draw

SMALL = AutoencoderParams(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16, resolution=64)


def module_of(params: AutoencoderParams, folder: Path, salt: str = "content-test") -> AutoencoderKL:
    path = folder / "ae.safetensors"
    write_safetensors(path, {key: draw(f"ae.{key}", shape, salt) for key, shape in autoencoder_shapes(params).items()})
    return load_autoencoder(path, params)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKL:
    return module_of(SMALL, tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture
def autoencoder(module: AutoencoderKL) -> Autoencoder:
    return Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159)


def pixels(height: int = 32, width: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(count: int = 1, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(1))


def test_agrees_with_the_authors_case(repository: Path, tmp_path: Path) -> None:
    """A case of our own in the reference format: what the authors' code computes with the recipe's weights."""
    path = repository / "tests" / "reference" / "autoencoder_two_levels.safetensors"
    source = SafetensorsSource(path)
    settings = json.loads(source.metadata["case"])
    source.close()
    params = AutoencoderParams(**settings["ae"] | {"ch_mult": tuple(settings["ae"]["ch_mult"])})
    case = load_file(path)
    module = module_of(params, tmp_path, settings["salt"])
    autoencoder = Autoencoder(module, scale_factor=params.scale_factor, shift_factor=params.shift_factor)
    assert relative_error(autoencoder.encode(case["pixels"]), case["latent"][0]) < 5e-6
    assert relative_error(autoencoder.decode(case["latent"]), case["decoded"]) < 5e-6


def test_encodes_to_the_scaled_and_shifted_mean(autoencoder: Autoencoder, module: AutoencoderKL) -> None:
    mean = module.encoder(pixels())[0, :16].double()
    latent = autoencoder.encode(pixels())
    assert latent.shape == (16, 4, 6)
    assert latent.dtype == torch.float32
    assert relative_error(latent, (mean - 0.1159) * 0.3611) < 1e-6


def test_decoding_undoes_scale_and_shift(autoencoder: Autoencoder, module: AutoencoderKL) -> None:
    expected = module.decoder(latents() / 0.3611 + 0.1159)
    found = autoencoder.decode(latents())
    assert found.shape == (1, 3, 32, 48)
    assert relative_error(found, expected) < 1e-6


def test_a_seeded_sample_spreads_around_the_mean(autoencoder: Autoencoder, module: AutoencoderKL) -> None:
    mean = autoencoder.encode(pixels())
    sample = autoencoder.encode(pixels(), sample_seed=3)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    deviation = torch.exp(0.5 * module.encoder(pixels())[0, 16:].clamp(-30, 20))
    assert relative_error(sample - mean, deviation * noise * 0.3611) < 1e-4
    assert torch.equal(sample, autoencoder.encode(pixels(), sample_seed=3))
    assert not torch.equal(sample, autoencoder.encode(pixels(), sample_seed=4))


def test_a_picture_is_the_same_alone_and_among_others(autoencoder: Autoencoder) -> None:
    together = autoencoder.decode(latents(3))
    assert all(
        torch.equal(together[index : index + 1], autoencoder.decode(latents(3)[index : index + 1])) for index in range(3)
    )


def test_encoder_and_decoder_may_have_their_own_precision(tmp_path: Path) -> None:
    full = Autoencoder(module_of(SMALL, tmp_path), scale_factor=0.3611, shift_factor=0.1159)
    mixed = Autoencoder(module_of(SMALL, tmp_path), scale_factor=0.3611, shift_factor=0.1159, decode_dtype=torch.bfloat16)
    assert torch.equal(mixed.encode(pixels()), full.encode(pixels()))
    decoded = mixed.decode(latents())
    assert decoded.dtype == torch.float32
    assert 1e-5 < relative_error(decoded, full.decode(latents())) < 0.05
    layouts = [
        module._module.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last) for module in (mixed, full)
    ]
    assert layouts == [True, False]


def test_strips_of_the_configuration_are_for_large_images(module: AutoencoderKL) -> None:
    plain = Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159)
    cut = Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159, tile_side=32)
    assert torch.equal(cut.encode(pixels(32, 32)), plain.encode(pixels(32, 32)))
    assert torch.equal(cut.decode(latents(1, 4, 4)), plain.decode(latents(1, 4, 4)))
    for found, expected in (
        (cut.encode(pixels(48, 80)), plain.encode(pixels(48, 80))),
        (cut.encode(pixels(48, 80), sample_seed=3), plain.encode(pixels(48, 80), sample_seed=3)),
        (cut.decode(latents(1, 6, 10)), plain.decode(latents(1, 6, 10))),
    ):
        assert found.shape == expected.shape
        assert 0 < relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("side", [0, -32, 15])
def test_refuses_strips_of_less_than_two_latent_cells(module: AutoencoderKL, side: int) -> None:
    with pytest.raises(ValueError, match=f"tile_side must be at least 16, got {side}"):
        Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159, tile_side=side)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 40, 32), "multiples of 16, got 32x40"),
        (torch.zeros(1, 3, 32, 0), "multiples of 16, got 0x32"),
        (torch.zeros(3, 32, 32), r"shape \[1, 3, h, w\], got \[3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32), r"shape \[1, 3, h, w\], got \[2, 3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), r"shape \[1, 3, h, w\], got \[1, 4, 32, 32\]"),
        (torch.full((1, 3, 32, 32), 255.0), r"in -1\.\.1, the largest magnitude is 255"),
        (torch.full((1, 3, 32, 32), float("nan")), r"in -1\.\.1, the largest magnitude is nan"),
    ],
)
def test_refuses_other_pixels(autoencoder: Autoencoder, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder.encode(given)


@pytest.mark.parametrize("shape", [(16, 4, 6), (1, 4, 4, 6), (0, 16, 4, 6)])
def test_refuses_other_latents(autoencoder: Autoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must have shape \[n, 16, h/8, w/8\]"):
        autoencoder.decode(torch.zeros(shape))


def test_pixels_are_hashed_with_the_encoder_and_the_seed(autoencoder: Autoencoder, module: AutoencoderKL) -> None:
    other = Autoencoder(module, scale_factor=0.5, shift_factor=0.1159)
    hashes = [
        autoencoder.hash_pixels(pixels()),
        autoencoder.hash_pixels(pixels(seed=1)),
        autoencoder.hash_pixels(pixels(), sample_seed=0),
        other.hash_pixels(pixels()),
    ]
    assert len(set(hashes)) == 4
    assert autoencoder.hash_pixels(pixels()) == hashes[0]
