"""Orientation from EXIF and XMP, in bounded work."""

import io
import logging
import struct
import tracemalloc

import pytest
from picture_files import RGB, chunk, encoded, gradient, png, tiff
from PIL import ExifTags, Image

from uso_engine.imaging.encoded import EncodedPicture
from uso_engine.imaging.open import open_image
from uso_engine.imaging.orientation import stored_orientation

XMP = b"<rdf:Description tiff:Orientation='%d'/>"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_byte_orders(order: str, orientation: int) -> None:
    picture = EncodedPicture(b"", (1, 1), exif=tiff(orientation, order), xmp=XMP % 2)
    assert stored_orientation(picture, label="") == orientation


@pytest.mark.parametrize(
    "exif",
    [b"no TIFF header at all", b"II*\0", b"II*\0\xff\xff\xff\xff", tiff(6)[:20], b"II*\0\x08\0\0\0\xff\xff" + bytes(50)],
)
def test_damaged_exif_is_logged_and_xmp_is_asked(exif: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert stored_orientation(EncodedPicture(b"", (1, 1), exif=exif), label="this picture") == 1
        assert stored_orientation(EncodedPicture(b"", (1, 1), exif=exif, xmp=XMP % 8), label="") == 8
    assert "this picture: its EXIF data is damaged" in caplog.text


def test_orientation_of_another_type_is_none() -> None:
    assert stored_orientation(EncodedPicture(b"", (1, 1), exif=tiff(6, kind=2)), label="") == 1


def test_entries_that_share_one_megabyte_are_not_copied() -> None:
    count = 4000
    entries = b"".join(struct.pack("<HHII", 0x8000 + i, 7, 1_000_000, 2 + 8 + 12 * count) for i in range(count))
    bomb = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(1_100_000)
    data = png(2, 1, 8, RGB, b"\0\xff\0\0\0\0\xff", before=chunk(b"eXIf", bomb))
    tracemalloc.start()
    try:
        assert open_image(data).size == (2, 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_what_a_caller_set_in_a_pillow_image_counts() -> None:
    image = Image.open(io.BytesIO(encoded(gradient(), "PNG")))
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert open_image(image).size == (16, 24)
