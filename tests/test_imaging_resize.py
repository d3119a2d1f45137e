"""The reference's size rules and resampling, and pixels to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from uso_engine.errors import ImageError, NumericsError
from uso_engine.imaging.open import open_image
from uso_engine.imaging.pixels import from_pixels, to_pixels
from uso_engine.imaging.resize import content_size, keep_size, resize_content

# What the authors' code made of synthetic_image(w, h, seed): size at long side 512, keep_size output, mean, two pixels.
# From the reference cases of USO commit b6784d7 (Pillow 13).
REFERENCE = [
    ((640, 480), 0, (512, 384), (1024, 768), (127.4796, 127.4968, 127.4934), (130, 187, 81), (4, 108, 87)),
    ((480, 640), 1, (384, 512), (768, 1024), (127.4297, 127.5004, 127.4643), (130, 187, 80), (17, 124, 70)),
    ((512, 512), 2, (512, 512), (1024, 1024), (127.5026, 127.5375, 127.5295), (128, 185, 79), (132, 237, 212)),
    ((1000, 333), 3, (512, 160), (1024, 320), (127.4957, 127.5075, 127.4990), (133, 229, 148), (153, 54, 131)),
    ((100, 100), 4, (512, 512), (1024, 1024), (123.1890, 127.3699, 126.5850), (126, 183, 78), (235, 131, 151)),
    ((1920, 1080), 5, (512, 288), (1024, 576), (127.5284, 127.5192, 127.5002), (142, 195, 89), (26, 63, 139)),
    ((37, 911), 6, (16, 512), (32, 1024), (129.9535, 130.3802, 127.0112), (167, 196, 91), (199, 208, 107)),
    ((513, 511), 7, (512, 496), (1024, 992), (127.5673, 127.4280, 127.4604), (128, 208, 110), (173, 71, 83)),
    ((16, 16), 8, (16, 16), (32, 32), (182.7617, 217.1367, 116.6875), (128, 185, 79), (189, 225, 118)),
]


def synthetic_image(w: int, h: int, seed: int) -> Image.Image:
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    planes = [127.5 + 127.5 * np.sin(x / (7 + seed) + c) * np.cos(y / (11 + 2 * seed) - c) for c in range(3)]
    return Image.fromarray(np.stack(planes, -1).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("given", "seed", "size", "kept", "mean", "corner", "centre"), REFERENCE)
def test_the_authors_numbers(
    given: tuple[int, int],
    seed: int,
    size: tuple[int, int],
    kept: tuple[int, int],
    mean: tuple[float, ...],
    corner: tuple[int, ...],
    centre: tuple[int, ...],
) -> None:
    resized = resize_content(open_image(synthetic_image(*given, seed)))
    array = np.asarray(resized).astype(float)
    assert resized.size == content_size(*given) == size
    assert keep_size(*given) == kept
    assert np.abs(array.mean((0, 1)) - mean).max() < 0.02
    assert np.abs(array[0, 0] - corner).max() <= 1
    assert np.abs(array[size[1] // 2, size[0] // 2] - centre).max() <= 1


def test_the_crop_is_central() -> None:
    """Of 24 rows the 4 above and the 4 below go."""
    rows = np.repeat(np.arange(24, dtype=np.uint8)[:, None], 512, 1)
    kept = np.asarray(resize_content(Image.fromarray(rows).convert("RGB")))
    assert kept.shape == (16, 512, 3)
    assert (kept[0, 0, 0], kept[-1, 0, 0]) == (4, 19)


def test_small_images_are_enlarged_and_a_float_quirk_is_kept() -> None:
    assert content_size(1, 1) == (512, 512)
    assert content_size(17, 16) == (512, 480)
    assert content_size(16, 16, long_side=64) == (16, 16)
    assert content_size(197, 197) == (512, 496)  # int(512 / 197 * 197) is 511 in the reference, too


@pytest.mark.parametrize("given", [(2000, 50), (50, 2000), (512, 15), (100_000, 1)])
def test_shapes_that_are_too_long_are_refused(given: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=rf"{given[0]}x{given[1]} becomes .* at long side 512.*at least 16 pixels"):
        content_size(*given)
    with pytest.raises(ImageError):
        keep_size(*given)
    if max(given) < 5000:
        with pytest.raises(ImageError):
            resize_content(Image.new("RGB", given))


def test_other_long_sides_keep_the_same_output() -> None:
    """The reference multiplies by 1024 / content_long_size, so a larger content image does not make a larger output."""
    assert content_size(640, 480, long_side=768) == (768, 576)
    assert keep_size(640, 480, long_side=768) == (1024, 768)
    assert keep_size(640, 480, long_side=384) == (1024, 768)
    assert keep_size(640, 480, long_side=500) == (1008, 752)  # 496x368 times 2.048, rounded down to multiples of 16
    assert keep_size(640, 480, long_side=128, output_long_side=256) == (256, 192)


def test_an_output_that_is_too_small_is_refused() -> None:
    with pytest.raises(ImageError, match="keep_size: content image 900x37 gives an output of 256x8"):
        keep_size(900, 37, long_side=512, output_long_side=256)


def test_to_pixels_is_to_tensor_times_two_minus_one() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    image = Image.fromarray(values.reshape(16, 16).numpy()).convert("RGB")
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert torch.equal(pixels[0, 1].flatten(), values.float() / 255 * 2 - 1)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)


def test_to_pixels_keeps_height_and_width_apart() -> None:
    image = Image.new("RGB", (32, 16))
    image.putpixel((31, 0), (255, 0, 0))
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 16, 32)
    assert pixels[0, :, 0, 31].tolist() == [1, -1, -1]


def test_to_pixels_wants_rgb() -> None:
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        to_pixels(Image.new("L", (16, 16)))


def test_from_pixels_clamps_and_truncates_like_the_reference() -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0])
    pixels = values.reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    first, second = from_pixels(pixels)
    assert [pixel[0] for pixel in np.asarray(first)[0].tolist()] == [0, 0, 127, 254, 255, 255]
    assert first.mode == "RGB"
    assert second.size == (6, 1)
    assert np.asarray(from_pixels(pixels.bfloat16())[0])[0, 2, 0] == 127


def test_pixels_come_back_as_they_went() -> None:
    """Truncation can lose one level on the way back, never two."""
    image = synthetic_image(48, 32, 3)
    back = np.asarray(from_pixels(to_pixels(image))[0]).astype(int)
    difference = np.asarray(image).astype(int) - back
    assert difference.min() >= 0
    assert difference.max() <= 1


def test_from_pixels_refuses_other_shapes_and_no_numbers() -> None:
    with pytest.raises(ValueError, match=r"expected pixels of shape \[n, 3, h, w\], got \[3, 4, 4\]"):
        from_pixels(torch.zeros(3, 4, 4))
    broken = torch.zeros(1, 3, 2, 2)
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"1 of 12 pixel values are not numbers$"):
        from_pixels(broken)
    with pytest.raises(NumericsError, match=r"the latents are numbers, so the autoencoder made them: .*decode_dtype"):
        from_pixels(broken, latents=torch.zeros(1, 16, 2, 2), tier="fp8")
    with pytest.raises(
        NumericsError, match=r"3 of 64 latent values are not either, so the denoising steps .* in tier fp8: try"
    ):
        from_pixels(
            broken, latents=torch.tensor([torch.nan, torch.inf, -torch.inf] + [0.0] * 61).reshape(1, 16, 2, 2), tier="fp8"
        )
