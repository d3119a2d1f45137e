"""Every kind of pixel becomes upright 8-bit RGB on white."""

from __future__ import annotations

import numpy as np
import pytest
from picture_files import encoded, flag
from PIL import ExifTags, Image

from uso_engine.errors import ImageError
from uso_engine.imaging.open import open_image


def array_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("orientation", "corner"),  # where the stored top left corner is in the upright picture
    [
        (1, (0, 0)),
        (2, (-1, 0)),
        (3, (-1, -1)),
        (4, (0, -1)),
        (5, (0, 0)),
        (6, (-1, 0)),
        (7, (-1, -1)),
        (8, (0, -1)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    stored = Image.new("RGB", (30, 20), "white")
    stored.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True})):
        upright = open_image(encoded(stored, kind, exif=exif, **options))
        assert upright.size == ((30, 20) if orientation < 5 else (20, 30))
        x, y = corner
        pixel = upright.getpixel((x % upright.width, y % upright.height))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 200, kind
        assert pixel[1] < 60, kind


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(flag(), "PNG", exif=b"Exif\0\0this is no TIFF header at all")
    assert np.array_equal(array_of(open_image(data)), array_of(flag()))


def transparent(mode: str) -> Image.Image:
    """Black where visible, with invisible orange beneath the transparent right half."""
    rgba = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    rgba.paste((255, 128, 0, 0), (4, 0, 8, 4))
    return rgba if mode == "RGBA" else rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_lies_on_white(mode: str) -> None:
    source = transparent(mode) if mode != "La" else transparent("LA").convert("La")
    opened = open_image(source)
    assert opened.getpixel((0, 0)) == (0, 0, 0)
    assert opened.getpixel((7, 0)) == (255, 255, 255)


def test_half_transparency_is_mixed_with_white() -> None:
    opened = open_image(Image.new("RGBA", (2, 2), (0, 100, 200, 128)))
    assert opened.getpixel((0, 0)) == (127, 177, 227)


def test_transparent_palette_and_transparent_colour() -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    data = encoded(palette, "PNG", transparency=0)
    assert open_image(data).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(data).getpixel((1, 0)) == (200, 100, 50)
    keyed = encoded(Image.new("RGB", (2, 2), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    assert open_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_palette_grey_and_one_bit() -> None:
    white_cmyk = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert open_image(white_cmyk).getpixel((4, 4)) == (255, 255, 255)
    cyan = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert np.abs(array_of(open_image(cyan))[4, 4] - (0, 255, 255)).max() <= 4
    assert open_image(encoded(Image.new("L", (2, 2), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(encoded(Image.new("1", (9, 2), 1), "PNG")).getpixel((8, 1)) == (255, 255, 255)
    quantised = flag().quantize(8)
    assert np.array_equal(array_of(open_image(encoded(quantised, "PNG"))), array_of(quantised.convert("RGB")))


@pytest.mark.parametrize("how", ["file", "pillow", "big-endian"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(how: str) -> None:
    values = np.array([[0, 255, 257, 32768, 65280, 65535]], np.uint16)
    deep = Image.fromarray(values)
    if how == "big-endian":
        deep = Image.frombytes("I;16B", deep.size, values.astype(">u2").tobytes())
    source = encoded(deep, "PNG") if how == "file" else deep
    assert [pixel[0] for pixel in array_of(open_image(source))[0]] == [0, 1, 1, 128, 254, 255]


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    deep = Image.fromarray(np.array([[0, 1000]], np.uint16))
    data = encoded(deep, "PNG", transparency=1000)
    assert [pixel[0] for pixel in array_of(open_image(data))[0]] == [0, 255]


def test_modes_without_a_range_are_refused() -> None:
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match=rf"mode {mode} has no defined range"):
            open_image(Image.new(mode, (4, 4)))


def test_every_other_pillow_mode_becomes_rgb() -> None:
    for mode in (
        "1",
        "L",
        "P",
        "RGB",
        "RGBX",
        "RGBA",
        "RGBa",
        "LA",
        "La",
        "PA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I;16",
        "I;16L",
    ):
        assert open_image(Image.new(mode, (4, 3))).size == (4, 3), mode


def test_callers_picture_is_not_changed() -> None:
    source = flag()
    source.info["note"] = "mine"
    opened = open_image(source)
    opened.putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) == (10, 200, 10)
    assert source.info == {"note": "mine"}
