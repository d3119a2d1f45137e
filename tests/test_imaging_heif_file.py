"""AVIF and HEIC files: sizes come from the streams' own headers; films, previews and metadata are kept from the decoder."""

import struct
import sys
import tracemalloc

import numpy as np
import pytest
from picture_files import encoded, heic
from PIL import Image

from uso_engine.errors import BackendError, ImageError
from uso_engine.imaging import heif_boxes
from uso_engine.imaging.av1_stream import examine_av1
from uso_engine.imaging.heif_boxes import read_container
from uso_engine.imaging.heif_file import is_hevc, strip_heif
from uso_engine.imaging.hevc_stream import examine_hevc
from uso_engine.imaging.open import ImageLimits, open_image


def smooth(width: int = 70, height: int = 50) -> Image.Image:
    """Colours that change slowly, which lossy formats keep; no two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 128 // (width - 1))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


PICTURE = smooth()
ALPHA = PICTURE.convert("RGBA")
ALPHA.putalpha(Image.linear_gradient("L").resize(PICTURE.size))
BEST: dict[str, dict[str, object]] = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIC": {"quality": 100, "chroma": 444}}


def written(kind: str, image: Image.Image, **options: object) -> bytes:
    options = {**BEST[kind], **options}
    return encoded(image, "AVIF", **options) if kind == "AVIF" else heic(image, **options)


FILES = {kind: written(kind, PICTURE) for kind in BEST}


def error_of(data: bytes, expected: Image.Image) -> int:
    found = open_image(data)
    assert found.size == expected.size
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max())


def stream_of(data: bytes) -> bytes:
    item = read_container(data).items[read_container(data).primary]
    return b"".join(data[start : start + length] for start, length in item.extents)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize("kind", BEST)
def test_pictures_transparency_and_grey(kind: str) -> None:
    assert is_hevc(strip_heif(FILES[kind], label="")) == (kind == "HEIC")
    assert error_of(FILES[kind], PICTURE) <= 4
    assert error_of(written(kind, ALPHA), open_image(ALPHA)) <= 5
    assert error_of(written(kind, PICTURE.convert("L")), PICTURE.convert("L").convert("RGB")) <= 3
    assert error_of(written(kind, smooth(333, 257)), smooth(333, 257)) <= 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", BEST)
def test_turned_pictures(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    expected = open_image(encoded(PICTURE, "PNG", exif=exif))
    data = written(kind, PICTURE, exif=exif.tobytes())
    assert error_of(data, expected) <= 4
    assert b"Exif" in {item.kind for item in read_container(data).items.values()}
    shown = read_container(strip_heif(data, label="").data)
    assert {item.kind for item in shown.items.values()} == {{"AVIF": b"av01", "HEIC": b"hvc1"}[kind], b"skip"}


def test_tiles_previews_and_films() -> None:
    large = smooth(200, 150)
    tiled = heic(large, quality=90, tile_size=64)
    assert b"grid" in tiled
    assert error_of(tiled, large) <= 12
    assert error_of(heic(large, quality=90, thumbnails=[128]), large) <= 12
    film = written("AVIF", PICTURE, save_all=True, append_images=[PICTURE.rotate(180)] * 3)
    assert film[8:12] == b"avis"
    assert error_of(film, PICTURE) <= 5
    assert b"moov" not in strip_heif(film, label="").data


@pytest.mark.parametrize("kind", BEST)
def test_size_is_read_before_decoding(kind: str) -> None:
    with pytest.raises(ImageError, match=r"is \d,\d{3} pixels; at most 3,499"):
        open_image(FILES[kind], limits=ImageLimits(max_pixels=3499))
    item = read_container(FILES[kind]).items[read_container(FILES[kind]).primary]
    size = item.all_of(b"ispe")[0]
    width, height = struct.unpack(">II", size[4:])
    larger = replaced(FILES[kind], size, size[:4] + struct.pack(">II", 30_000, 30_000))
    with pytest.raises(ImageError, match=r"a stream of \d+x\d+ pixels in an item of 30000x30000"):
        open_image(larger)
    smaller = replaced(FILES[kind], size, size[:4] + struct.pack(">II", width - 1, height))
    with pytest.raises(ImageError, match=rf"{kind} image is truncated or damaged"):
        open_image(replaced(smaller, size[:4] + struct.pack(">II", width - 1, height), size[:4] + struct.pack(">II", 5, 5)))


def test_streams_of_several_frames_are_refused() -> None:
    av1 = stream_of(FILES["AVIF"])
    assert examine_av1(av1) == [(70, 50)]
    with pytest.raises(ValueError, match="2 frames"):
        examine_av1(av1 + av1)
    with pytest.raises(ValueError, match="more than 10,000 units"):
        examine_av1(b"\x12\0" * 20_000)
    with pytest.raises(ValueError, match="a unit without a length"):
        examine_av1(b"\x08" + av1)
    with pytest.raises(ValueError, match="0 frames"):
        examine_av1(b"\x12\0")
    (configuration,) = read_container(FILES["HEIC"]).items[read_container(FILES["HEIC"]).primary].all_of(b"hvcC")
    hevc = stream_of(FILES["HEIC"])
    assert all(70 <= width <= 134 and 50 <= height <= 114 for width, height in examine_hevc(configuration, hevc))
    with pytest.raises(ValueError, match="2 pictures"):
        examine_hevc(configuration, hevc + hevc)
    with pytest.raises(ValueError, match="more than 10,000 units"):
        examine_hevc(configuration, b"\0\0\0\2\x4e\1" * 20_000)
    with pytest.raises(EOFError):
        examine_hevc(configuration, hevc[:-1])
    with pytest.raises(EOFError):
        examine_hevc(configuration[:30], hevc)


def test_an_av1_header_with_room_for_a_larger_frame_is_refused() -> None:
    """Frames may bring sizes of their own, in as many bits as the header names."""

    def header(width_bits: int) -> bytes:
        bits = f"{'0001100000'}{width_bits - 1:04b}{5:04b}{69:0{width_bits}b}{49:06b}"
        body = int(bits.ljust(64, "0"), 2).to_bytes(8)
        return b"\x0a\x08" + body + b"\x32\0"

    assert examine_av1(header(7)) == [(70, 50)]
    with pytest.raises(ValueError, match="16 and 6 bits for the sides of 70x50 pixels"):
        examine_av1(header(16))


def box(name: bytes, *bodies: bytes) -> bytes:
    body = b"".join(bodies)
    return struct.pack(">I", len(body) + 8) + name + body


def container(
    *, extents: bytes, count: int = 1, size: int = 1, kind: bytes = b"av01", more: bytes = b"", tail: bytes = b""
) -> bytes:
    """A HEIF file of one item, with places of its bytes as given."""
    entry = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), kind, b"\0")
    properties = box(b"iprp", box(b"ipco", box(b"ispe", bytes(4), struct.pack(">II", size, size))), box(b"ipma", bytes(4),
                     struct.pack(">IHBB", 1, 1, 1, 1)))  # fmt: skip
    places = box(b"iloc", b"\0\0\0\0\x44\0", struct.pack(">HHHH", 1, 1, 0, count), extents)
    meta = box(
        b"meta", bytes(4), box(b"pitm", bytes(4), b"\0\1"), box(b"iinf", bytes(4), b"\0\1", entry), places, properties, more
    )
    return box(b"ftyp", b"avif", bytes(4), b"mif1avif") + meta + box(b"mdat", bytes(100)) + tail


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\0\0\0\x10ftypavif\0\0\0\0", "no still picture"),
        (box(b"ftyp", b"avif", bytes(4)) + box(b"meta", bytes(4)), "no pitm, iinf, iloc, iprp"),
        (box(b"ftyp", b"avif", bytes(4)) + box(b"meta", bytes(2**20 + 5)), "a description of 1,048,581 bytes"),
        (container(extents=struct.pack(">II", 0, 0xFFFFFFFF)), "beyond the file's end"),
        (container(extents=struct.pack(">II", 0, 200) * 9, count=9), "longer together than the file"),
        (container(extents=b"", count=60_000), "beyond the file's end"),
        (container(extents=struct.pack(">II", 60, 1), tail=b"\0\0\0\x08free" * 10_001), "more than 10,000 boxes"),
        (container(extents=struct.pack(">II", 60, 1), more=box(b"pitm", bytes(6))), "two b'pitm' boxes"),
        (container(extents=struct.pack(">II", 60, 1), kind=b"jpeg"), "a picture of kind 'jpeg' in a HEIF file; expected AVIF"),
        (container(extents=struct.pack(">II", 60, 1), kind=b"grid"), "a grid of 0 tiles"),
        (container(extents=struct.pack(">II", 60, 1), kind=b"hvc1"), "an item with 0 configurations"),
        (container(extents=struct.pack(">II", 60, 1)), "AVIF image is truncated or damaged"),
        (FILES["AVIF"][:-20], "beyond the file's end|breaks off"),
        (FILES["HEIC"][:-20], "beyond the file's end|breaks off"),
        (FILES["AVIF"][:200], "breaks off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_itself_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        open_image(data)


def test_places_that_repeat_the_same_bytes_cost_no_memory() -> None:
    """60,000 extents, each of them the whole file."""
    body = container(extents=struct.pack(">II", 0, 2_000_000) * 60_000, count=60_000, tail=box(b"free", bytes(2_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="longer together than the file"):
            open_image(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
    assert heif_boxes.MAX_EXTENTS == 100_000


def test_without_the_libraries_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BackendError, match=r"pip install 'uso-engine\[heif\]'"):
        open_image(FILES["HEIC"])
    monkeypatch.setattr("uso_engine.imaging.decode.features.check", lambda name: False)
    with pytest.raises(BackendError, match="a Pillow that was built with libavif"):
        open_image(FILES["AVIF"])
