"""GIF files: the first frame costs what its pixels cost, whatever stands around it."""

import io
import struct

import numpy as np
import pytest
from picture_files import encoded, gradient
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging import gif_file
from uso_engine.imaging.gif_file import strip_gif
from uso_engine.imaging.open import ImageLimits, open_image

PICTURE = gradient().quantize(7)
PLAIN = encoded(PICTURE, "GIF")
IMAGE = PLAIN.index(b"\x2c", 13 + 24)
"""Where the frame begins, behind a palette of 8 colours."""


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data))


def test_the_first_frame_alone_is_kept() -> None:
    film = encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(180)] * 5, comment=b"c" * 5000, loop=0)
    stripped = strip_gif(film, label="")
    assert len(stripped.data) < len(film) / 3
    assert (stripped.size, getattr(Image.open(io.BytesIO(stripped.data)), "n_frames", 1)) == ((24, 16), 1)
    assert np.array_equal(pixels(film), np.asarray(PICTURE.convert("RGB")))
    assert np.array_equal(pixels(PLAIN[:IMAGE] + b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0" * 1000 + PLAIN[IMAGE:]), pixels(PLAIN))


def test_transparency_palettes_and_interlace() -> None:
    see_through = encoded(PICTURE, "GIF", transparency=PICTURE.getpixel((0, 0)))
    shown = pixels(see_through)
    gone = np.asarray(PICTURE) == PICTURE.getpixel((0, 0))
    assert (shown[gone] == 255).all()
    assert np.array_equal(shown[~gone], pixels(PLAIN)[~gone])
    assert np.array_equal(pixels(encoded(PICTURE, "GIF", interlace=True)), pixels(PLAIN))
    local = PLAIN[:10] + b"\0" + PLAIN[11:13] + PLAIN[IMAGE : IMAGE + 9] + b"\xc2" + PLAIN[13 : 13 + 24] + PLAIN[IMAGE + 10 :]
    assert np.array_equal(pixels(local), pixels(PLAIN))


def test_a_frame_beyond_the_screen_counts_for_the_size() -> None:
    wide = bytearray(PLAIN)
    wide[IMAGE + 1 : IMAGE + 3] = struct.pack("<H", 60_000)
    wide[IMAGE + 3 : IMAGE + 5] = struct.pack("<H", 60_000)
    with pytest.raises(ImageError, match=r"60024x60016 is 3,602,400,384 pixels"):
        open_image(bytes(wide))
    claimed = PLAIN[:6] + struct.pack("<HH", 50_000, 50_000) + PLAIN[10:]
    with pytest.raises(ImageError, match=r"50000x50000 is 2,500,000,000 pixels"):
        open_image(claimed)
    with pytest.raises(ImageError, match="24x16 is 384 pixels; at most 383"):
        open_image(PLAIN, limits=ImageLimits(max_pixels=383))


def test_blocks_and_codes_without_pixels_are_bounded() -> None:
    start = IMAGE + 11
    codes = b"".join(b"\xff" + b"\x92\x49\x24" * 85 for _ in range(300))  # three-bit codes that all start over
    with pytest.raises(ImageError, match=r"7\d,\d{3} bytes of compressed data for 24x16 pixels"):
        open_image(PLAIN[:start] + codes + b"\0;")
    many = PLAIN[:IMAGE] + b"\x21\xfe\0" * 10 + b"\x21\xfe" + b"\1x" * (gif_file.MAX_BLOCKS + 5) + b"\0" + PLAIN[IMAGE:]
    with pytest.raises(ImageError, match=r"in more than 500,000 blocks"):
        open_image(many)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PLAIN[:12], "breaks off within its header"),
        (PLAIN[:IMAGE] + b";", "it has no frame"),
        (PLAIN[:IMAGE], "it has no frame"),
        (PLAIN[:IMAGE] + b"\0", "unknown kind 0"),
        (PLAIN[: IMAGE + 5], "within a frame's header"),
        (PLAIN[:-4], "within its blocks"),
        (PLAIN[: IMAGE + 11] + b"\0;", "cannot be decoded$"),
        (PLAIN[: IMAGE + 10] + b"\x0d" + PLAIN[IMAGE + 11 :], "cannot be decoded$"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)
