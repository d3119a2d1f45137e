"""BMP files: every pixel is in the file before a decoder sees it, and what is not read is refused by name."""

import struct

import numpy as np
import pytest
from picture_files import encoded, gradient

from uso_engine.errors import ImageError
from uso_engine.imaging.open import open_image

PICTURE = gradient()
PLAIN = encoded(PICTURE, "BMP")
INDEXED = encoded(PICTURE.quantize(7), "BMP")
HEADER = struct.unpack("<IiiHHIIiiII", PLAIN[14:54])


def bmp(
    body: bytes, width: int = 2, height: int = 1, bits: int = 24, method: int = 0, more: bytes = b"", size: int = 40
) -> bytes:
    """A BMP with what follows its header, masks or a palette, and its pixels."""
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, method, 0, 0, 0, 0, 0) + more
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


def masks(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def pixels(data: bytes) -> list[list[int]]:
    return np.asarray(open_image(data))[0].tolist()


def test_layouts_of_colours() -> None:
    red_blue = [[255, 0, 0], [0, 0, 255]]
    assert pixels(bmp(b"\0\0\xff\xff\0\0\0\0")) == red_blue
    assert pixels(bmp(b"\0\0\xff\0\xff\0\0\0", bits=32)) == red_blue  # the fourth byte means nothing here
    assert pixels(bmp(struct.pack("<HH", 0xF800, 0x1F), bits=16, method=3, more=masks(0xF800, 0x7E0, 0x1F))) == red_blue
    assert (
        pixels(bmp(b"\xff\0\0\0\0\0\xff\0", bits=32, method=3, more=masks(0xFF, 0xFF00, 0xFF0000, 0xFF000000), size=56))
        == [[255] * 3] * 2
    )
    assert pixels(bmp(b"\x00\0\xff\0\xff\0\0\0", bits=32, method=3, more=masks(0xFF0000, 0xFF00, 0xFF))) == red_blue
    core = b"BM" + struct.pack("<IHHIIHHHH", 0, 0, 0, 26, 12, 2, 1, 1, 24) + b"\0\0\xff\xff\0\0\0\0"
    assert pixels(core) == red_blue
    assert pixels(bmp(b"\x40\0\0\0", bits=1, more=b"\0\0\xff\0\xff\0\0\0")) == red_blue


def test_rows_from_the_top_and_from_the_bottom() -> None:
    assert np.array_equal(np.asarray(open_image(PLAIN)), np.asarray(PICTURE))
    rows = [PLAIN[54 + 72 * i : 54 + 72 * (i + 1)] for i in range(16)]
    upside_down = PLAIN[:22] + struct.pack("<i", -16) + PLAIN[26:54] + b"".join(reversed(rows))
    assert np.array_equal(np.asarray(open_image(upside_down)), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PLAIN[:20], "breaks off within its header"),
        (PLAIN[:14] + struct.pack("<I", 39) + PLAIN[18:], "a header of 39 bytes"),
        (PLAIN[:18] + struct.pack("<ii", 30_000, 30_000) + PLAIN[26:], r"1,152 bytes of pixels; expected 2,700,000,000"),
        (PLAIN[:-1], r"1,151 bytes of pixels; expected 1,152"),
        (PLAIN[:10] + struct.pack("<I", 2**31) + PLAIN[14:], r"0 bytes of pixels; expected 1,152"),
        (PLAIN[:10] + struct.pack("<I", 20) + PLAIN[14:], r"start at byte 20, before its palette ends"),
        (PLAIN[:18] + struct.pack("<i", -24) + PLAIN[22:], "-24x16 pixels in 1 planes of 24 bits"),
        (PLAIN[:22] + struct.pack("<i", -(2**31)) + PLAIN[26:], "24x-2147483648 pixels"),
        (PLAIN[:26] + struct.pack("<H", 2) + PLAIN[28:], "in 2 planes"),
        (PLAIN[:28] + struct.pack("<H", 64) + PLAIN[30:], "of 64 bits"),
        (INDEXED[:46] + struct.pack("<I", 257) + INDEXED[50:], r"a palette of 257 colours for pixels of 8 bits"),
        (bmp(b"\0\1", bits=8, method=1), r"compressed by run lengths \(RLE8\).*save it as PNG"),
        (bmp(b"\0\1", bits=24, method=4), "compressed by JPEG"),
        (bmp(b"\0\1", bits=24, method=77), "compressed by method 77"),
        (bmp(bytes(8), bits=32, method=3, more=masks(1, 2, 4)), "32 bits with the colour masks 0x1, 0x2, 0x4, 0x0"),
        (bmp(bytes(8), bits=8, method=3, more=masks(1, 2, 4)), "8 bits with the colour masks"),
        (bmp(b"", bits=32, method=3), "breaks off within its masks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)


def test_size_is_read_before_decoding() -> None:
    flat = bmp(bytes(1252 * 10_000), 10_000, 10_000, bits=1, more=bytes(8))
    with pytest.raises(ImageError, match=r"10000x10000 is 100,000,000 pixels"):
        open_image(flat)
