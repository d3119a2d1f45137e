"""WebP files: chunks are counted before a decoder holds them, and orientation is found without one."""

import struct

import pytest
from picture_files import encoded, gradient, tiff

from uso_engine.errors import ImageError
from uso_engine.imaging.open import open_image
from uso_engine.imaging.webp_file import read_webp


def with_chunks(data: bytes, more: bytes) -> bytes:
    whole = data + more
    return b"RIFF" + struct.pack("<I", len(whole) - 8) + whole[8:]


def test_many_chunks_are_refused() -> None:
    data = encoded(gradient(), "WEBP", exif=b"Exif\0\0" + tiff(1))
    assert open_image(with_chunks(data, b"abcd" + bytes(4))).size == (24, 16)
    with pytest.raises(ImageError, match=r"in more than 100,000 chunks"):
        open_image(with_chunks(data, (b"abcd" + bytes(4)) * 110_000))


@pytest.mark.parametrize("prefix", [b"Exif\0\0", b""])
def test_orientation_with_and_without_the_prefix_that_jpeg_has(prefix: bytes) -> None:
    data = encoded(gradient(), "WEBP", exif=prefix + tiff(6))
    assert read_webp(data, label="").exif == tiff(6)
    assert open_image(data).size == (16, 24)


def test_a_container_without_a_picture() -> None:
    with pytest.raises(ImageError, match="it does not start with a picture"):
        open_image(b"RIFF\x10\0\0\0WEBPJUNK\4\0\0\0abcd")
