"""JPEG files: padding, comments and foreign data cost nothing, and scans are counted before they are decoded."""

import io

import numpy as np
import pytest
from picture_files import encoded, gradient, segment, tiff
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging import jpeg_file
from uso_engine.imaging.jpeg_file import strip_jpeg
from uso_engine.imaging.open import ImageLimits, open_image

PLAIN = encoded(gradient(), "JPEG")
START, END, SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"


def same(data: bytes, as_data: bytes = PLAIN) -> bool:
    return open_image(data).tobytes() == open_image(as_data).tobytes()


def test_what_is_stripped_decodes_to_the_same_pixels() -> None:
    for options in ({}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"restart_marker_blocks": 1}):
        for image in (gradient(70, 50), gradient(70, 50).convert("L"), gradient(70, 50).convert("CMYK")):
            data = encoded(image, "JPEG", comment=b"x" * 999, icc_profile=bytes(200_000), **options)
            stripped = strip_jpeg(data, label="picture")
            assert stripped.size == (70, 50)
            assert len(stripped.data) < len(data) - 200_000
            with Image.open(io.BytesIO(data)) as whole:
                assert np.array_equal(np.asarray(open_image(data)), np.asarray(whole.convert("RGB"))), options
    assert strip_jpeg(encoded(gradient(), "JPEG", progressive=True), label="").scans == 10


def test_padding_and_foreign_data_are_left_out() -> None:
    padded = (
        START + b"\xff" * 10_000_000 + PLAIN[2:],
        START + b"\xff\0" * 1_000_000 + PLAIN[2:],
        PLAIN[:20] + b"junk" * 1_000_000 + PLAIN[20:],
        PLAIN[:-2] + b"\xff" * 10_000_000 + END,
        PLAIN + b"a film after the picture" + SCAN * 100_000,
        START + segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 300 + PLAIN[2:],
        START + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 300 + PLAIN[2:],
        PLAIN[:-2] + segment(0xFE, bytes(60_000)) * 300 + END,
    )
    for data in padded:
        assert len(strip_jpeg(data, label="").data) < len(PLAIN) + 100
        assert same(data)


def test_too_many_segments_are_refused() -> None:
    with pytest.raises(ImageError, match=r"in more than 10,000 segments"):
        open_image(START + segment(0xFE, b"") * 11_000 + PLAIN[2:])


def test_scans_are_limited_by_the_size_of_the_picture() -> None:
    data = encoded(Image.new("RGB", (2048, 1024), "red"), "JPEG", progressive=True)
    last = data.rindex(SCAN)
    once_more = data[last:-2]
    assert open_image(data).getpixel((9, 9)) == (254, 0, 0)
    allowed = jpeg_file.MAX_SCANNED_PIXELS // (2048 * 1024)
    assert strip_jpeg(data[:-2] + once_more * (allowed - 10) + END, label="").scans == allowed
    with pytest.raises(ImageError, match=r"2048x1024 pixels is in 1,025 scans; at most 1,024 are accepted at that size"):
        open_image(data[:-2] + once_more * (allowed - 9) + END)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (START + PLAIN[PLAIN.index(SCAN) :], "it has no frame header"),
        (PLAIN[: PLAIN.index(SCAN)] + END, "it has no scan"),
        (PLAIN[: PLAIN.index(SCAN)], "it has no scan"),
        (PLAIN[:-2] + segment(0xC0, bytes(15)) + END, "two frame headers"),
        (START + segment(0xC0, bytes(3)) + PLAIN[2:], "a frame header of 3 bytes"),
        (PLAIN[:-2], "truncated or damaged and cannot be decoded$"),
        (START + b"\xff\xe0\0\1" + PLAIN[2:], "it breaks off within a segment"),
        (START + b"\xff\xe0\xff\xff" + PLAIN[2:], "it breaks off within a segment"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)


def test_the_first_exif_and_xmp_count() -> None:
    turned = START + segment(0xE1, b"Exif\0\0" + tiff(6)) + segment(0xE1, b"Exif\0\0" + tiff(1)) + PLAIN[2:]
    assert open_image(turned).size == (16, 24)
    xmp = b"http://ns.adobe.com/xap/1.0/\0<rdf:Description><tiff:Orientation>6</tiff:Orientation></rdf:Description>"
    assert open_image(START + segment(0xE1, xmp) + PLAIN[2:]).size == (16, 24)


def test_a_deadline_ends_what_bounds_let_through() -> None:
    for data in (PLAIN, encoded(gradient(), "PNG")):
        with pytest.raises(ImageError, match=r"decoding it took longer than 1e-09 s"):
            open_image(data, limits=ImageLimits(decode_deadline_s=1e-9))
