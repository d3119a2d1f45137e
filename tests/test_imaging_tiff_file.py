"""TIFF files: a decoder sees one directory of checked entries; everything else in the file is never followed."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from picture_files import encoded, gradient, tiff_file
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging.open import ImageLimits, open_image
from uso_engine.imaging.tiff_file import strip_tiff

PICTURE = gradient(70, 50)
ALPHA = PICTURE.convert("RGBA")
ALPHA.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
DEEP = Image.fromarray((np.arange(3500).reshape(50, 70) * 18).astype(np.uint16))
IMAGES = {
    "RGB": PICTURE,
    "L": PICTURE.convert("L"),
    "P": PICTURE.quantize(7),
    "1": PICTURE.convert("1"),
    "RGBA": ALPHA,
    "LA": ALPHA.convert("LA"),
    "CMYK": PICTURE.convert("CMYK"),
    "I;16": DEEP,
}
ROW = b"\xff\0\0\0\0\xff"  # red, blue
TWO = {256: (2,), 257: (1,), 258: (8, 8, 8), 262: (2,), 277: (3,)}


def pixels(data: bytes) -> list[list[int]]:
    return np.asarray(open_image(data))[0].tolist()


@pytest.mark.parametrize("mode", IMAGES)
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_every_kind_gives_the_pixels_that_png_gives(mode: str, compression: str | None) -> None:
    image = IMAGES[mode]
    expected = open_image(encoded(image, "PNG") if mode == "I;16" else image)
    whole = encoded(image, "TIFF", compression=compression, icc_profile=bytes(200_000), description="x" * 100_000)
    assert np.array_equal(np.asarray(open_image(whole)), np.asarray(expected))
    stripped = strip_tiff(whole, label="")
    assert stripped.size == (70, 50)
    assert len(stripped.data) < len(whole) - 300_000


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_byte_orders_strips_tiles_and_planes(order: str, big: bool) -> None:
    rows = [np.asarray(PICTURE)[i].tobytes() for i in range(50)]
    base = {256: (70,), 257: (50,), 258: (8, 8, 8), 262: (2,), 277: (3,)}
    strips = tiff_file({**base, 278: (7,)}, [b"".join(rows[i : i + 7]) for i in range(0, 50, 7)], order, big=big)
    padded = np.zeros((64, 96, 3), np.uint8)
    padded[:50, :70] = np.asarray(PICTURE)
    tiles = [padded[y : y + 32, x : x + 48].tobytes() for y in (0, 32) for x in (0, 48)]
    tiled = tiff_file({**base, 322: (48,), 323: (32,)}, tiles, order, big=big)
    packed = tiff_file({**base, 322: (48,), 323: (32,), 259: (8,)}, [zlib.compress(tile) for tile in tiles], order, big=big)
    planes = [np.ascontiguousarray(np.asarray(PICTURE)[..., c]).tobytes() for c in range(3)]
    planar = tiff_file({**base, 284: (2,)}, planes, order, big=big)
    planar_packed = tiff_file({**base, 284: (2,), 259: (8,)}, [zlib.compress(plane) for plane in planes], order, big=big)
    for data in (strips, tiled, packed, planar, planar_packed):
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(PICTURE))
    deep = (np.arange(12).reshape(2, 2, 3) * 5000).astype(f"{order}u2")
    colours = tiff_file({**base, 256: (2,), 257: (2,), 258: (16,) * 3}, [deep.tobytes()], order, big=big)
    assert np.array_equal(np.asarray(open_image(colours)), deep >> 8)
    grey = tiff_file({256: (2,), 257: (6,), 258: (16,), 262: (1,)}, [deep.tobytes()], order, big=big)
    assert np.array_equal(np.asarray(open_image(grey))[..., 0].ravel(), (deep.ravel().astype(int) * 255 + 32767) // 65535)


def test_orientation_predictor_and_white_is_zero() -> None:
    for orientation, turned in (
        (6, Image.Transpose.ROTATE_270),
        (3, Image.Transpose.ROTATE_180),
        (5, Image.Transpose.TRANSPOSE),
    ):
        for compression in (None, "tiff_lzw"):
            data = encoded(PICTURE, "TIFF", compression=compression, tiffinfo={274: orientation})
            assert np.array_equal(np.asarray(open_image(data)), np.asarray(PICTURE.transpose(turned)))
    assert np.array_equal(
        np.asarray(open_image(encoded(PICTURE, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}))), np.asarray(PICTURE)
    )
    assert pixels(tiff_file({256: (2,), 257: (1,), 258: (8,), 262: (0,)}, [b"\0\xff"])) == [[255] * 3, [0] * 3]


def test_the_first_page_is_taken_and_the_others_are_not_looked_at() -> None:
    pages = encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(180)] * 3)
    assert np.array_equal(np.asarray(open_image(pages)), np.asarray(PICTURE))
    assert getattr(Image.open(io.BytesIO(strip_tiff(pages, label="").data)), "n_frames", 1) == 1
    looping = bytearray(tiff_file(TWO, [ROW]))
    start = struct.unpack_from("<I", looping, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", looping, start)[0]
    looping[end : end + 4] = struct.pack("<I", start)  # the next directory is this one
    assert pixels(bytes(looping)) == [[255, 0, 0], [0, 0, 255]]


def one_strip(**changes: tuple[int, ...]) -> bytes:
    names = {"bits": 258, "compression": 259, "colour": 262, "samples": 277, "rows": 278, "planes": 284, "predictor": 317}
    names |= {"palette": 320, "extra": 338, "format": 339, "width": 256, "height": 257, "order": 266, "inks": 332, "kind": 254}
    names |= {"offsets": 273, "counts": 279, "tile": 322, "tile_height": 323, "dng": 50706}
    return tiff_file({**TWO, **{names[name]: values for name, values in changes.items()}}, [ROW])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"II*\0\xff\xff\xff\xff", "breaks off within its directory"),
        (b"II+\0\4\0\0\0" + bytes(8), "offsets are not of 8 bytes"),
        (b"II+\0\x08\0\0\0" + b"\xff" * 8, "breaks off within its directory"),
        (struct.pack("<2sHIH", b"II", 42, 8, 60_000), "60,000 entries"),
        (one_strip(compression=(7,)), r"compressed by JPEG; expected none, LZW, deflate or PackBits"),
        (one_strip(compression=(50000,)), "compressed by Zstandard"),
        (one_strip(compression=(999,)), "compressed by method 999"),
        (one_strip(compression=(8,)), "cannot be decoded$"),
        (one_strip(colour=(8,)), "a TIFF image in CIELab; expected grey, RGB, CMYK or a palette"),
        (one_strip(colour=(32803,)), "a camera's colour filter"),
        (one_strip(bits=(8, 8, 16)), "3 samples with 8, 8, 16 bits"),
        (one_strip(bits=(32,) * 3), "unsigned samples of 32 bits is not read"),
        (one_strip(bits=(32,) * 3, format=(3,)), "float samples of 32 bits is not read"),
        (one_strip(format=(2, 2, 2)), "signed samples of 8 bits"),
        (one_strip(samples=(7,), bits=(8,) * 7), "7 samples"),
        (one_strip(extra=(0,)), "3 unsigned samples of 8 bits is not read"),
        (one_strip(order=(2,)), "fill order 2"),
        (one_strip(planes=(3,)), "planes 3"),
        (one_strip(predictor=(3,)), "predictor 3"),
        (one_strip(kind=(1,)), "begins with a preview"),
        (one_strip(dng=(0x01040000,)), "a camera's raw file"),
        (one_strip(width=(0,)), "0x1 pixels"),
        (one_strip(width=(2**31,)), "2147483648x1 pixels"),
        (one_strip(width=(30_000,), height=(30_000,)), r"strip or tile 0 is 6 bytes at 8, the file has"),
        (one_strip(offsets=(2**32 - 2,)), r"strip or tile 0 is 6 bytes at 4,294,967,294"),
        (one_strip(height=(9,), rows=(1,)), "1 strips or tiles; expected 9"),
        (one_strip(tile=(17,), tile_height=(16,)), "tiles of 17x16; expected multiples of 16"),
        (one_strip(tile=(2**30,), tile_height=(2**30,)), r"1 tiles of 1073741824x1073741824 for 2x1 pixels"),
        (one_strip(tile=(16,)), "no entry 323"),
        (
            tiff_file({256: (2,), 257: (1,), 258: (8,), 262: (3,), 320: (0,) * 9}, [b"\0\1"]),
            "a palette of 9 numbers; expected 768",
        ),
        (tiff_file({**TWO, 259: (8,), 278: (1,), 257: (9,)}, [b"x"] * 9), "cannot be decoded$"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)


def test_numbers_that_are_not_whole_or_too_many_are_refused() -> None:
    data = bytearray(tiff_file(TWO, [ROW]))
    start = struct.unpack_from("<I", data, 4)[0] + 2
    for kind, length in ((5, 1), (2, 1), (4, 2**31), (4, 0)):
        changed = bytearray(data)
        changed[start + 2 : start + 8] = struct.pack("<HI", kind, length)
        with pytest.raises(ImageError, match=f"entry 256 has {length:,} values of type {kind}"):
            open_image(bytes(changed))


def test_strips_that_repeat_the_same_bytes_cost_no_memory() -> None:
    """Each of 60,000 strips is all of a file of two megabytes: read one after the other they are 120 GB."""
    body = bytes(2_000_000)
    data = tiff_file({256: (9,), 257: (60_000,), 258: (8,), 259: (8,), 262: (1,), 278: (1,), 273: (8,) * 60_000,
                      279: (2_000_000,) * 60_000}, [body])  # fmt: skip
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="bytes of strips or tiles for"):
            open_image(data)
        rows = {256: (900,), 257: (60_000,), 258: (8,), 262: (1,), 278: (1,), 273: (8,) * 60_000, 279: (900,) * 60_000}
        with pytest.raises(ImageError, match="bytes of strips or tiles for"):
            open_image(tiff_file(rows, [bytes(900)]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000


def test_size_is_read_before_decoding() -> None:
    bomb = zlib.compress(bytes(30_000 * 30_000 // 8), 9)
    data = tiff_file({256: (30_000,), 257: (30_000,), 258: (1,), 259: (8,), 262: (1,)}, [bomb])
    with pytest.raises(ImageError, match=r"30000x30000 is 900,000,000 pixels"):
        open_image(data)
    with pytest.raises(ImageError, match=r"70x50 is 3,500 pixels; at most 3,499"):
        open_image(encoded(PICTURE, "TIFF", compression="tiff_lzw"), limits=ImageLimits(max_pixels=3499))


def test_a_strip_that_unpacks_to_more_than_its_rows_ends_there() -> None:
    base = {256: (70,), 257: (50,), 258: (8, 8, 8), 259: (8,), 262: (2,), 277: (3,)}
    longer = tiff_file(base, [zlib.compress(np.asarray(PICTURE).tobytes() + bytes(50_000_000), 9)])
    assert np.array_equal(np.asarray(open_image(longer)), np.asarray(PICTURE))
    empty_blocks = b"\x78\x01" + b"\0\0\0\xff\xff" * 20_000 + zlib.compress(np.asarray(PICTURE).tobytes())[2:]
    with pytest.raises(ImageError, match="bytes of strips or tiles for 10,500 bytes of pixels"):
        open_image(tiff_file(base, [empty_blocks]))
