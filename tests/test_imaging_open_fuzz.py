"""Whatever is given as a picture ends in a picture or an error of ours.

``python tests/test_imaging_open_fuzz.py 20000`` tries as many cases as it says.
"""

import base64
import io
import socket
import sys
import time
import zlib
from pathlib import Path
from unittest import mock
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    PNG_SIGNATURE,
    RGB,
    RGB_ALPHA,
    chunk,
    encoded,
    further_files,
    gradient,
    png,
    segment,
    tiff,
    tiff_file,
)
from PIL import Image

from uso_engine.errors import USOError
from uso_engine.imaging.open import Alpha, ImageLimits, describe_source, open_image

LIMITS = ImageLimits(max_bytes=200_000, max_pixels=20_000, deadline_s=5)


def seeds() -> list[bytes]:
    """Sound files of every kind that mutations start from."""
    colour = gradient()
    alpha = colour.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(colour.size))
    images = (colour, alpha, colour.convert("L"), colour.convert("LA"), colour.convert("1"), colour.quantize(7))
    files = [encoded(image, "PNG") for image in images]
    files.append(encoded(colour.quantize(7), "PNG", transparency=b"\0\x80\xff"))
    files.append(encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999), "PNG", transparency=999))
    files.append(encoded(colour, "PNG", save_all=True, append_images=[colour.rotate(180)]))
    files.append(png(24, 1, 8, RGB, b"\0" + bytes(72), before=chunk(b"eXIf", tiff(6)) + chunk(b"tRNS", bytes(6))))
    for options in (
        {},
        {"progressive": True},
        {"exif": b"Exif\0\0" + tiff(6), "comment": b"hello"},
        {"restart_marker_rows": 1},
    ):
        files.append(encoded(colour, "JPEG", **options))
    files += [encoded(colour.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    files += [encoded(alpha, "WEBP"), encoded(alpha, "WEBP", lossless=True, exif=b"Exif\0\0" + tiff(8))]
    files.append(encoded(colour, "WEBP", save_all=True, append_images=[colour.rotate(180)]))
    return files + further_files(colour, alpha)


SEEDS = seeds()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound file with bytes changed, cut out, doubled or put in; PNG checksums are mended half of the time."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        until = at + draw(st.integers(0, 40))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until] * draw(st.integers(1, 30))
            case 3:
                data[at:at] = draw(st.binary(max_size=20))
            case _:
                del data[at:]
    return mended(bytes(data)) if data.startswith(PNG_SIGNATURE) and draw(st.booleans()) else bytes(data)


def mended(data: bytes) -> bytes:
    """The PNG with right checksums, so that what lies behind them is reached."""
    parts, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        parts.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts)


CHUNK_NAMES = [b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL", b"sBIT", b"bKGD"]


@st.composite
def made_png(draw: st.DrawFn) -> bytes:
    """A PNG whose chunks are well formed and need not agree with each other."""
    names = st.sampled_from(CHUNK_NAMES)
    chunks = st.lists(st.tuples(names, st.binary(max_size=30)), max_size=4)
    around = [b"".join(chunk(name, body) for name, body in draw(chunks)) for _ in range(2)]
    width, height = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    depth = draw(st.sampled_from([1, 2, 4, 8, 16, 3, 0]))
    colour = draw(st.sampled_from([GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA, 5]))
    return png(width, height, depth, colour, draw(st.binary(max_size=400)), before=around[0], after=around[1])


@st.composite
def made_tiff(draw: st.DrawFn) -> bytes:
    """A TIFF of entries that need not agree with each other."""
    sizes, small = st.integers(0, 40), st.integers(0, 9)
    entries = {256: (draw(sizes),), 257: (draw(sizes),), 258: (draw(st.sampled_from([1, 2, 4, 8, 12, 16, 32])),) * draw(small)}
    entries[259] = (draw(st.sampled_from([1, 1, 5, 7, 8, 32773, 0])),)
    entries[262] = (draw(st.integers(0, 8)),)
    for code in (277, 278, 284, 266, 317, 338, 339, 332, 254, 322, 323, 274):
        if draw(st.integers(0, 4)) == 0:
            entries[code] = (draw(st.sampled_from([0, 1, 2, 3, 4, 16, 32, 2**32 - 1])),) * draw(st.integers(1, 3))
    if draw(st.booleans()):
        entries[320] = (draw(st.integers(0, 2**16)),) * draw(st.sampled_from([6, 48, 768]))
    packed = st.one_of(st.binary(max_size=200), st.binary(max_size=600).map(zlib.compress))
    return tiff_file(
        {code: values for code, values in entries.items() if values},
        draw(st.lists(packed, min_size=1, max_size=5)),
        draw(st.sampled_from("<>")),
        big=draw(st.booleans()),
    )


@st.composite
def made_jpeg(draw: st.DrawFn) -> bytes:
    """A JPEG of segments that need not agree with each other."""
    sound = draw(st.sampled_from([file for file in SEEDS if file.startswith(b"\xff\xd8")]))
    parts = [segment(draw(st.integers(0xC0, 0xFE)), draw(st.binary(max_size=40))) for _ in range(draw(st.integers(0, 4)))]
    at = draw(st.sampled_from([2, sound.index(b"\xff\xda"), len(sound) - 2]))
    return sound[:at] + b"".join(parts) + sound[at:]


FILES = st.one_of(mutated(), made_png(), made_jpeg(), made_tiff(), st.binary(max_size=60))
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # surrogates and null bytes too


@st.composite
def data_uris(draw: st.DrawFn) -> str:
    data = draw(FILES)
    header = draw(st.sampled_from(["data:image/png", "data:", "DATA:;charset=x", "data:image/webp;name=\0"]))
    if draw(st.booleans()):
        return f"{header};base64,{base64.b64encode(data).decode()}{draw(st.sampled_from(['', '=', 'é', chr(0xD800), ' %']))}"
    return f"{header},{quote_from_bytes(data)}{draw(ANY_TEXT)}"


HOSTS = ["xn--", "xn--a", "a..b", "[::1", "1.2.3", "é", "a:99999"]
URLS = st.one_of(
    st.builds("{}://{}".format, st.sampled_from(["http", "https", "HTTP"]), ANY_TEXT),
    st.builds("http://{}/{}?{}".format, st.sampled_from(HOSTS), ANY_TEXT, ANY_TEXT),
    st.builds("http://{}.example:{}/".format, ANY_TEXT, st.integers(-1, 10**6)),
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
DTYPES = ["uint8", "int16", "uint16", "bool", "float16", "float32", "float64", "complex64", "object", "M8[s]", "U3", "V4"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    array = np.zeros(draw(SHAPES), draw(st.sampled_from(DTYPES)))
    if array.dtype.kind == "f":
        array += draw(st.sampled_from([0.0, 0.5, 1.0, -1.0, 255.0, np.nan, np.inf]))
    return array.T if draw(st.booleans()) else array


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    kinds = [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.complex64]
    tensor = torch.zeros(draw(SHAPES), dtype=draw(st.sampled_from(kinds)), device=draw(st.sampled_from(["cpu", "cpu", "meta"])))
    return tensor.to_sparse() if tensor.ndim and tensor.device.type == "cpu" and draw(st.booleans()) else tensor


class BrokenFile:
    """A file object that answers with something else."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def read(self, size: int) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


MODES = ["1", "L", "P", "PA", "RGB", "RGBA", "RGBa", "LA", "La", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"]
PILLOW = st.builds(Image.new, st.sampled_from(MODES), st.tuples(st.integers(0, 9), st.integers(0, 9)))
OBJECTS = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(st.none(), max_size=2),
    st.builds(object),
    st.builds(BrokenFile, st.sampled_from([None, "text", 3, OSError(5, "broken"), ValueError("closed"), bytearray(b"x")])),
)
SOURCES = st.one_of(
    FILES,
    FILES.map(bytearray),
    FILES.map(lambda data: memoryview(data)),
    FILES.map(io.BytesIO),
    data_uris(),
    URLS,
    ANY_TEXT,
    arrays(),
    tensors(),
    PILLOW,
    OBJECTS,
    ANY_TEXT.map(Path),
)


def refuse(*arguments: object, **options: object) -> list[object]:
    raise socket.gaierror(-2, "Name or service not known")


def check(source: object, alpha: Alpha) -> str:
    """Open a source; say how it ended.

    Raises:
        Exception: anything that is no USOError, or a message with an object's address or half a surrogate pair in it.
    """
    caught = opened = None
    with mock.patch("socket.getaddrinfo", refuse):
        try:
            opened = open_image(source, limits=LIMITS, name="image", alpha=alpha)  # type: ignore[arg-type]
        except USOError as error:
            caught = error
    if caught is not None:
        assert " at 0x" not in str(caught)
        str(caught).encode()
        return type(caught).__name__
    assert opened is not None
    assert opened.mode == "RGB"
    assert min(opened.size) >= 1
    describe_source(source)  # type: ignore[arg-type]
    return "a picture"


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(source=SOURCES, alpha=st.sampled_from(["white", "drop"]))
def test_every_source_ends_in_a_picture_or_an_error_of_ours(source: object, alpha: Alpha) -> None:
    check(source, alpha)


@pytest.mark.parametrize("data", SEEDS, ids=range(len(SEEDS)))
def test_what_mutations_start_from_is_sound(data: bytes) -> None:
    assert check(data, "white") == "a picture"


def main(cases: int) -> None:
    """Try many cases and print how they ended."""
    ends: dict[str, int] = {}
    slowest = 0.0

    @settings(deadline=None, max_examples=cases, database=None, suppress_health_check=list(HealthCheck))
    @given(source=SOURCES, alpha=st.sampled_from(["white", "drop"]))
    def run(source: object, alpha: Alpha) -> None:
        nonlocal slowest
        start = time.perf_counter()
        end = check(source, alpha)
        slowest = max(slowest, time.perf_counter() - start)
        ends[end] = ends.get(end, 0) + 1

    run()
    sys.stdout.write(f"{sum(ends.values())} cases, slowest {slowest:.2f} s: {ends}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
