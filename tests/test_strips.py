"""The autoencoder in strips: as the whole but for rounding, however it is cut, and within the memory that plans count with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from live_bytes import LiveBytes
from torch import Tensor, nn

from uso_engine import load_config
from uso_engine.conditioning import strips as strips_module
from uso_engine.conditioning.plane import Keeper, Plane
from uso_engine.conditioning.strips import Strips, decode_in_strips, encode_in_strips
from uso_engine.loading.assembly import load_autoencoder as load_own_autoencoder
from uso_engine.offload.autoencoder_sizes import FLUX_DECODER, FLUX_ENCODER, STRIP_PIXELS, Cut
from uso_engine.verification.measure import relative_error

CUTS = [1, 100, 333, 1000, 10**6]
"""Pixels of a strip: single rows, several heights, all rows at once."""

BOUND = 5e-6
"""Of the largest difference between strips and the whole in float32, relative to the largest value: rounding of many layers."""

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def diffusers_autoencoder(channels: tuple[int, ...], layers: int, groups: int) -> AutoencoderKL:
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    module.eval().requires_grad_(False)
    return module


def autoencoder_of(channels: tuple[int, ...], layers: int, groups: int, seed: int = 0) -> AutoencoderKL:
    """A random autoencoder with norms that scale and shift, as a trained one's do."""
    torch.manual_seed(seed)
    module = diffusers_autoencoder(channels, layers, groups)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape)
    return module


@pytest.fixture(scope="module", params=[((16, 32, 48, 48), 1, 8), ((24, 24), 2, 4)], ids=["four levels", "two levels"])
def module(request: pytest.FixtureRequest) -> AutoencoderKL:
    return autoencoder_of(*request.param)


@pytest.fixture(scope="module")
def flux_like() -> AutoencoderKL:
    return autoencoder_of((16, 32, 48, 48), 1, 8)


def latent(height: int = 7, width: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().amax() / expected.double().abs().amax())


def decoded(module: AutoencoderKL, z: Tensor, pixels: int, *, on_host: bool = False, layout: Any = CONTIGUOUS) -> Tensor:
    picture, moved = decode_in_strips(module.decoder, z, Strips(pixels, on_host), layout)
    assert (moved > 0) == on_host
    return picture


@pytest.mark.parametrize(("height", "width"), [(7, 11), (1, 1), (2, 9), (12, 3)])
def test_decoding_in_strips_equals_the_whole(module: AutoencoderKL, height: int, width: int) -> None:
    z = latent(height, width)
    whole = module.decoder(z)
    wide = autoencoder_copy(module).double().decoder(z.double())
    for pixels in CUTS:
        found = decoded(module, z, pixels)
        assert found.shape == whole.shape
        assert largest_error(found, whole) < BOUND
        # Nor are strips further from the truth.
        assert largest_error(found, wide) < 2 * largest_error(whole, wide) + 1e-7


@pytest.mark.parametrize(("height", "width"), [(48, 80), (16, 16), (112, 32)])
def test_encoding_in_strips_equals_the_whole(module: AutoencoderKL, height: int, width: int) -> None:
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole = module.encoder(pixels)
    for count in CUTS:
        found, _ = encode_in_strips(module.encoder, pixels, Strips(count), CONTIGUOUS)
        assert found.shape == whole.shape
        assert largest_error(found, whole) < BOUND


def test_bfloat16_is_as_near_to_the_truth_as_the_whole() -> None:
    wide, half = autoencoder_of((16, 32, 48, 48), 1, 8).double(), autoencoder_of((16, 32, 48, 48), 1, 8)
    half.decoder.to(torch.bfloat16).to(memory_format=CHANNELS_LAST)
    z = latent().bfloat16().contiguous(memory_format=CHANNELS_LAST)
    truth, whole = wide.decoder(z.double()), half.decoder(z)

    for pixels in CUTS:
        found = decoded(half, z, pixels, layout=CHANNELS_LAST)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, truth) < 1.1 * relative_error(whole, truth) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_wherever_planes_lie(flux_like: AutoencoderKL, dtype: torch.dtype) -> None:
    half = autoencoder_copy(flux_like).to(dtype)
    for pixels in (1, 333):
        z = latent().to(dtype)
        assert torch.equal(decoded(half, z, pixels, on_host=True), decoded(half, z, pixels))


def test_a_norm_does_not_depend_on_the_cut() -> None:
    rows = torch.randn(1, 24, 37, 53, generator=torch.Generator().manual_seed(3)) * 3 + 40
    norm = nn.GroupNorm(8, 24, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    found = []
    for step in (1, 2, 5, 36, 37):
        plane = Plane(Keeper(torch.device("cpu"), CONTIGUOUS), 24, 37, 53)
        for part in rows.split(step, 2):
            plane.add(part)
        found.append(plane.norm_factors(norm.requires_grad_(False)))
    assert all(torch.equal(scale, found[0][0]) and torch.equal(shift, found[0][1]) for scale, shift in found)
    expected = norm.double()(rows.double())
    assert largest_error(plane.window(0, 37, found[0]), expected) < 1e-6


def test_windows_are_rows_with_zeros_around_them() -> None:
    rows = torch.randn(1, 4, 10, 6)
    for on_host in (False, True):
        for step in (1, 3, 10):
            plane = Plane(Keeper(torch.device("cpu"), CONTIGUOUS, on_host), 4, 10, 6, measured=False)
            for part in rows.split(step, 2):
                plane.add(part)
            padded = torch.nn.functional.pad(rows, (0, 0, 2, 2))
            for start, stop in [(-2, 12), (-1, 1), (0, 10), (4, 5), (8, 11), (2, 9)]:
                assert torch.equal(plane.window(start, stop), padded[:, :, start + 2 : stop + 2])
            plane.forget_before(6)
            assert torch.equal(plane.window(6, 10), rows[:, :, 6:])
            if step < 10:
                with pytest.raises(RuntimeError, match="rows 5 to 10 of a plane were asked for"):
                    plane.window(5, 10)


# Faults that strips could have, each of them put in: the bound has to tell.


def _without_neighbours(
    original: Callable[..., Tensor], plane: Plane, start: int, stop: int, *args: Any, **kwargs: Any
) -> Tensor:
    """A convolution that sees zeros where the next strip's first row is."""
    rows = original(plane, start, stop, *args, **kwargs)
    if stop < plane.height:
        rows[:, :, -1:].zero_()
    return rows


def _neighbours_without_norm(
    original: Callable[..., Tensor], plane: Plane, start: int, stop: int, *args: Any, **kwargs: Any
) -> Tensor:
    """The row above a strip as it was before its normalisation."""
    rows = original(plane, start, stop, *args, **kwargs)
    if start > 0:
        rows[:, :, :1] = original(plane, start, start + 1)
    return rows


def _norm_of_the_first_strip(original: Callable[..., Any], plane: Plane, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Statistics of a strip in place of the plane's."""
    first = plane._strips[0].rows
    part = Plane(plane.keeper, plane.channels, first.shape[2], plane.width)
    part.add(first)
    factors: tuple[Tensor, Tensor] = original(part, norm)
    return factors


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("window", _without_neighbours),
        ("window", _neighbours_without_norm),
        ("norm_factors", _norm_of_the_first_strip),
    ],
)
def test_a_fault_at_a_seam_is_seen(
    flux_like: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., Any]
) -> None:
    z = latent()
    whole = flux_like.decoder(z)
    original = getattr(Plane, name)
    monkeypatch.setattr(Plane, name, lambda plane, *args, **kwargs: fault(original, plane, *args, **kwargs))
    assert largest_error(decoded(flux_like, z, 333), whole) > 100 * BOUND


def test_attention_that_sees_its_strip_alone_is_seen(flux_like: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    z = latent()
    whole, attend = flux_like.decoder(z), torch.nn.functional.scaled_dot_product_attention

    def attend_to_the_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_to_the_first)
    assert largest_error(decoded(flux_like, z, 50), whole) > 100 * BOUND


def test_the_embedded_decoder_in_strips(repository: Path) -> None:
    section = load_config("uso-tiny").autoencoder
    assert section is not None
    path = repository / "uso_engine" / "embedded" / "uso-tiny" / "ae.safetensors"
    autoencoder = load_own_autoencoder(section, path, device="cpu")
    latents = torch.randn(2, 16, 10, 14, generator=torch.Generator().manual_seed(4))
    whole = autoencoder.decode(latents)
    cut = autoencoder.decode(latents, Strips(1000))
    assert 0 < largest_error(cut, whole) < BOUND
    # One by one: alone and among others the bits are the same.
    assert torch.equal(cut[1:], autoencoder.decode(latents[1:], Strips(1000)))
    assert autoencoder.moved_bytes == 0
    assert torch.equal(autoencoder.decode(latents, Strips(1000, on_host=True)), cut)
    assert autoencoder.moved_bytes > 0
    # A picture that is no larger than a strip is not cut.
    assert torch.equal(autoencoder.decode(latents, Strips(80 * 112)), whole)


@pytest.mark.gpu
def test_strips_on_a_gpu_equal_the_whole(flux_like: AutoencoderKL) -> None:
    decoder, z = autoencoder_copy(flux_like).to("cuda").decoder, latent(33, 47).to("cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):
        whole = decoder(z)
        for pixels in (3000, 40000):
            found, _ = decode_in_strips(decoder, z, Strips(pixels), CONTIGUOUS)
            assert largest_error(found, whole) < BOUND
            from_host, moved = decode_in_strips(decoder, z, Strips(pixels, on_host=True), CONTIGUOUS)
            assert moved > 0
            assert largest_error(from_host, found) < BOUND


class Elsewhere:
    """Memory that is not counted: what a tensor on the host was like."""

    def __init__(self, rows: Tensor) -> None:
        self.shape, self.dtype = rows.shape, rows.dtype


class CountedKeeper(Keeper):
    """Keeps planes out of the count, and brings tensors without values."""

    def keep(self, rows: Tensor) -> Any:
        self.moved_bytes += rows.nbytes if self.on_host else 0
        return Elsewhere(rows) if self.on_host else rows

    def bring(self, kept: Any) -> Tensor:
        if not self.on_host:
            return super().bring(kept)
        rows = self.empty(kept.shape[1], kept.shape[2], kept.shape[3], kept.dtype)
        self.moved_bytes += rows.nbytes
        return rows


@pytest.mark.parametrize("cut", ["strips", "host strips"])
@pytest.mark.parametrize("what", ["decoding 768", "encoding 512"])
def test_memory_is_what_plans_count_with(what: str, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX's autoencoder without values, every live tensor counted but for planes on the host."""
    monkeypatch.setattr(strips_module, "Keeper", CountedKeeper)
    side = int(what.split()[1])
    with torch.device("meta"):
        module = diffusers_autoencoder((128, 256, 512, 512), 2, 32)
        z, pixels = torch.empty(1, 16, side // 8, side // 8), torch.empty(1, 3, side, side)
    strips = Strips(STRIP_PIXELS, cut == "host strips")
    decodes = what.startswith("decoding")
    sizes = FLUX_DECODER if decodes else FLUX_ENCODER
    with torch.no_grad(), LiveBytes() as counted:
        if decodes:
            _, moved = decode_in_strips(module.decoder, z, strips, CONTIGUOUS)
        else:
            _, moved = encode_in_strips(module.encoder, pixels, strips, CONTIGUOUS)
    planned = sizes.peak_bytes(cut, side**2)
    assert 0.6 * planned < counted.peak <= planned
    assert counted.peak < 0.5 * sizes.peak_bytes("whole", side**2)
    assert moved == pytest.approx(sizes.moved_bytes(cut, side**2), rel=0.05)


def autoencoder_copy(module: AutoencoderKL) -> AutoencoderKL:
    copy = AutoencoderKL.from_config(module.config)
    copy.load_state_dict(module.state_dict())
    return copy.eval().requires_grad_(False)
