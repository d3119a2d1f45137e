"""PNG files: what pixels do not need is not unpacked, and what contradicts itself is refused by name."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from picture_files import GREY, PALETTE, PNG_SIGNATURE, RGB, RGB_ALPHA, chunk, encoded, gradient, png, tiff
from PIL import Image, PngImagePlugin

from uso_engine.errors import ImageError
from uso_engine.imaging import png_file
from uso_engine.imaging.open import open_image

RED_BLUE = b"\0\xff\0\0\0\0\xff"  # one row of two RGB pixels
HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, RGB, 0, 0, 0))
TWO_INDICES = b"\0\0\1"


def pixels(data: bytes) -> list[list[int]]:
    return np.asarray(open_image(data))[0].tolist()


def test_large_text_and_profiles_are_passed_over_and_not_unpacked() -> None:
    bomb = zlib.compress(bytes(64_000_000), 9)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "{}" * 800_000, zip=True)
    text.add_text("parameters", "x" * 3_000_000)
    sound = encoded(gradient(), "PNG", pnginfo=text, icc_profile=bytes(1_500_000))
    ancillary = (
        chunk(b"zTXt", b"comment\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb),
        chunk(b"tEXt", b"no terminator"),
        chunk(b"iCCP", b"\0\7unknown compression"),
        chunk(b"acTL", b"short"),
        chunk(b"tEXt", b"a\0b", checksum=1),
    )
    hostile = [png(2, 1, 8, RGB, RED_BLUE, before=one) for one in ancillary]
    tracemalloc.start()
    try:
        assert np.array_equal(np.asarray(open_image(sound)), np.asarray(gradient()))
        for data in hostile:
            assert pixels(data) == [[255, 0, 0], [0, 0, 255]]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000


def test_compressed_data_without_contents_is_refused() -> None:
    """Empty blocks: a decoder prepares for each of them and gets nothing."""

    def with_empty_blocks(count: int) -> bytes:
        stream = b"\x78\x01" + b"\0\0\0\xff\xff" * count + zlib.compress(RED_BLUE)[2:]
        return PNG_SIGNATURE + HEADER + chunk(b"IDAT", stream) + chunk(b"IEND")

    assert pixels(with_empty_blocks(13_000)) == [[255, 0, 0], [0, 0, 255]]
    with pytest.raises(ImageError, match=r"70,0[12]\d bytes of compressed data for 2x1 pixels"):
        open_image(with_empty_blocks(14_000))


def test_many_chunks_are_refused_and_many_pieces_of_pixels_are_joined() -> None:
    data = png(2, 1, 8, RGB, RED_BLUE)
    at = data.index(b"IDAT") - 4
    with pytest.raises(ImageError, match=r"in more than 100,000 chunks"):
        open_image(data[:at] + chunk(b"abCd") * 1_000_000 + data[at:])
    noise = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "PNG")
    at = whole.index(b"IDAT") - 4
    length = int.from_bytes(whole[at : at + 4])
    body = whole[at + 8 : at + 8 + length]
    pieces = b"".join(chunk(b"IDAT", body[i : i + 1]) + chunk(b"IDAT") for i in range(length))
    assert np.array_equal(np.asarray(open_image(whole[:at] + pieces + whole[at + 12 + length :])), noise)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(2, 1, 8, PALETTE, TWO_INDICES), r"a palette of 0 bytes; expected 3 to 768"),
        (png(2, 1, 8, PALETTE, TWO_INDICES, before=chunk(b"PLTE", bytes(5))), r"a palette of 5 bytes"),
        (png(2, 1, 8, PALETTE, TWO_INDICES, before=chunk(b"PLTE", bytes(771))), r"a palette of 771 bytes"),
        (png(8, 1, 1, PALETTE, b"\0\1", before=chunk(b"PLTE", bytes(9))), r"a palette of 9 bytes; expected 3 to 6"),
        (
            png(2, 1, 8, PALETTE, TWO_INDICES, before=chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", bytes(3))),
            r"tRNS has 3 entries; the palette has 2",
        ),
        (png(2, 1, 8, PALETTE, TWO_INDICES, after=chunk(b"PLTE", bytes(6))), r"a palette of 0 bytes"),
        (png(2, 1, 8, RGB, RED_BLUE, before=chunk(b"tRNS", bytes(300))), r"tRNS has 300 bytes; expected 6"),
        (png(2, 1, 8, GREY, b"\0ab", before=chunk(b"tRNS", bytes(1))), r"tRNS has 1 bytes; expected 2"),
        (png(2, 1, 4, GREY, b"\0a", before=chunk(b"tRNS", b"\0\x10")), r"the value 16, which 4 bits cannot hold"),
        (png(2, 1, 3, GREY, b"\0a"), r"no colour type 0 with 3 bits"),
        (png(2, 1, 8, 5, RED_BLUE), r"no colour type 5"),
        (PNG_SIGNATURE, r"IHDR has 0 bytes; expected 13"),
        (PNG_SIGNATURE + chunk(b"IHDR", bytes(5)), r"IHDR has 5 bytes; expected 13"),
        (PNG_SIGNATURE + chunk(b"IDAT", bytes(5)), r"does not start with IHDR"),
        (png(2, 1, 8, RGB, RED_BLUE, before=chunk(b"IHDR", bytes(13))), r"two IHDR chunks"),
        (png(2, 1, 8, RGB, RED_BLUE, before=chunk(b"IDAT", b"", checksum=7)), r"the checksum of IDAT is wrong"),
        (png(2, 1, 8, RGB, RED_BLUE)[:-20], r"it breaks off within a chunk"),
        (png(2, 1, 8, RGB, RED_BLUE)[:-5], r"it breaks off between two chunks"),
        (png(2, 1, 8, RGB, b""), r"truncated or damaged and cannot be decoded$"),
        (png(2, 1, 8, RGB, RED_BLUE)[:33] + chunk(b"IEND"), r"truncated or damaged and cannot be decoded$"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)


def test_transparent_values_are_those_of_the_stored_depth() -> None:
    """The decoder brings samples to 8 bits and leaves the transparent value as it was."""
    white, grey = [255] * 3, [170] * 3
    assert pixels(png(4, 1, 2, GREY, b"\0\x1b", before=chunk(b"tRNS", b"\0\1"))) == [[0] * 3, white, grey, white]
    assert pixels(png(2, 1, 4, GREY, b"\0\x1a", before=chunk(b"tRNS", b"\0\1"))) == [white, grey]
    assert pixels(png(2, 1, 1, GREY, b"\0\x40", before=chunk(b"tRNS", b"\0\0"))) == [white, white]
    deep = struct.pack(">6H", 0x1234, 0x1234, 0x1234, 0x2000, 0, 0)
    keyed = png(2, 1, 16, RGB, b"\0" + deep, before=chunk(b"tRNS", deep[:6]))
    assert pixels(keyed) == [white, [32, 0, 0]]
    # Beside an alpha channel it means nothing.
    assert pixels(png(1, 1, 8, RGB_ALPHA, b"\0\1\2\3\xff", before=chunk(b"tRNS", bytes(6)))) == [[1, 2, 3]]


def test_a_file_whose_end_mark_alone_is_missing_is_whole() -> None:
    assert pixels(png(2, 1, 8, RGB, RED_BLUE)[:-12]) == [[255, 0, 0], [0, 0, 255]]


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
PROFILE = b"\nexif\n%8d\n" % len(tiff(3)) + tiff(3).hex().encode() + b"\n"


@pytest.mark.parametrize(
    "carrier",
    [
        chunk(b"eXIf", tiff(3)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        chunk(b"tEXt", b"Raw profile type exif\0" + PROFILE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE)),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_orientation_is_found_wherever_writers_put_it(carrier: bytes, place: str) -> None:
    data = png(2, 1, 8, RGB, RED_BLUE, **{place: carrier})
    assert pixels(data) == [[0, 0, 255], [255, 0, 0]]


def test_stripping_keeps_every_kind_of_png() -> None:
    colour = gradient()
    alpha = colour.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(colour.size))
    kinds = (colour, alpha, colour.convert("L"), colour.convert("LA"), colour.convert("1"), colour.quantize(7))
    for image in kinds:
        data = encoded(image, "PNG")
        stripped = png_file.strip_png(data, label="picture")
        assert stripped.size == image.size
        assert open_image(data).tobytes() == open_image(image).tobytes(), image.mode
