"""Every kind of picture and non-picture people send, and what the message says."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_files import chunk, encoded, flag
from PIL import Image, PngImagePlugin

from uso_engine.errors import FetchError, ImageError, MissingFileError
from uso_engine.imaging.open import ImageLimits, describe_source, open_image


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def array_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def no_leak(message: str) -> None:
    assert not re.search(r"0x[0-9a-f]{6}|<PIL|object at|BytesIO|Traceback", message), message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_way_to_hand_over_a_picture_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    data = encoded(flag(), kind)
    path = tmp_path / "picture.bin"  # content decides, not the name
    path.write_bytes(data)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    sources = (
        str(path),
        path,
        data,
        io.BytesIO(data),
        "data:image/anything;base64," + base64.b64encode(data).decode(),
        "DATA:;BASE64," + base64.b64encode(data).decode().rstrip("="),
        Image.open(io.BytesIO(data)),
    )
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.info == {}
        assert np.array_equal(array_of(opened), array_of(expected)), describe_source(source)


def test_percent_encoded_data_uri() -> None:
    data = encoded(flag(), "PNG")
    uri = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    assert np.array_equal(array_of(open_image(uri)), array_of(flag()))


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert open_image(data).getpixel((5, 5)) == (255, 0, 0), kind


def test_one_pixel_is_a_picture() -> None:
    assert open_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).size == (1, 1)


def test_a_hundred_megapixels_are_refused_from_the_header() -> None:
    with pytest.raises(ImageError, match=r"10000x10000 is 100,000,000 pixels; at most 67,108,864") as caught:
        open_image(png_claiming(10_000, 10_000))
    no_leak(str(caught.value))
    # Pillow itself would refuse these two before it says how large they are.
    with pytest.raises(ImageError, match=r"60000x60000 is 3,600,000,000 pixels"):
        open_image(png_claiming(60_000, 60_000))
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended
    with pytest.raises(ImageError, match=r"16383x16383 is 268,402,689 pixels"):
        open_image(webp)
    with pytest.raises(ImageError, match=r"9000x9000 is 81,000,000 pixels"):
        open_image(Image.new("1", (9000, 9000)))


def test_webp_sizes_are_read_from_all_three_kinds_of_header() -> None:
    limits = ImageLimits(max_pixels=1199)
    alpha = flag().convert("RGBA")
    alpha.putalpha(100)
    for data in (encoded(flag(), "WEBP"), encoded(flag(), "WEBP", lossless=True), encoded(alpha, "WEBP")):
        with pytest.raises(ImageError, match="40x30 is 1,200 pixels; at most 1,199"):
            open_image(data, limits=limits)
        assert open_image(data).size == (40, 30)


def test_jpeg_size_is_read_before_decoding() -> None:
    data = bytearray(encoded(flag(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 50_000)
    with pytest.raises(ImageError, match=r"50000x60000 is 3,000,000,000 pixels"):
        open_image(bytes(data))


def test_empty_pictures_are_refused() -> None:
    with pytest.raises(ImageError, match="0x5 pixels; expected at least 1x1"):
        open_image(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError):
        open_image(png_claiming(0, 7))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image") as caught:
        open_image(data[: int(len(data) * part)])
    no_leak(str(caught.value))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage_anywhere_is_a_picture_or_an_image_error(kind: str) -> None:
    data = encoded(flag(24, 24), kind)
    random = np.random.default_rng(7)
    for _ in range(150):
        broken = bytearray(data)
        for at in random.integers(12, len(data), 3):
            broken[at] = random.integers(0, 256)
        try:
            open_image(bytes(broken), limits=ImageLimits(max_pixels=10_000))
        except ImageError as error:
            no_leak(str(error))


def test_huge_text_chunks_do_not_cost_the_picture() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 30_000_000, zip=True)
    assert np.array_equal(array_of(open_image(encoded(flag(), "PNG", pnginfo=info))), array_of(flag()))


class Trickle(io.RawIOBase):
    """Gives less than it is asked for, as a pipe does."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def read(self, size: int = -1) -> bytes:
        part, self._left = self._left[: min(size, 7)], self._left[min(size, 7) :]
        return part


def test_files_that_give_less_than_they_are_asked_for() -> None:
    data = encoded(flag(), "PNG")
    assert np.array_equal(array_of(open_image(Trickle(data))), array_of(flag()))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"more than 70 bytes"):
        open_image(Trickle(data), limits=ImageLimits(max_bytes=70))  # type: ignore[arg-type]


def test_a_file_that_stands_at_its_end_is_told_from_an_empty_one() -> None:
    written = io.BytesIO()
    flag().save(written, "PNG")
    with pytest.raises(ImageError, match=r"nothing is left after where it stands; .*\.seek\(0\)"):
        open_image(written)
    written.seek(0)
    assert np.array_equal(array_of(open_image(written)), array_of(flag()))
    with pytest.raises(ImageError, match=r"empty \(0 bytes\)"):
        open_image(io.BytesIO())
    with pytest.raises(ImageError, match=r"empty \(0 bytes\)"):
        open_image(Trickle(b""))  # type: ignore[arg-type]


def test_files_that_cannot_be_read() -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match=r"file object: cannot be read: closed or broken"):
        open_image(closed)


def test_byte_limits_for_every_source(tmp_path: Path) -> None:
    data = encoded(flag(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    limits = ImageLimits(max_bytes=len(data) - 1)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, path, io.BytesIO(data), uri, uri + "A" * 3000):
        with pytest.raises(ImageError, match=f"{limits.max_bytes:,}"):
            open_image(source, limits=limits)
    assert open_image(data, limits=ImageLimits(max_bytes=len(data))).size == (40, 30)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nothing\.png': no such file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="not a regular file"):
        open_image("/dev/zero")
    with pytest.raises(ImageError, match=r"cannot be read|no such file"):
        open_image("iVBORw0KGgo" * 400)  # base64 without its data: prefix
    with pytest.raises((ImageError, MissingFileError)):
        open_image("a\0b.png")
    with pytest.raises(ImageError, match="empty string"):
        open_image("")


def test_servers_do_not_open_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(flag(), "PNG"))
    for source in (str(path), path, path.as_uri(), f"file:{path}"):
        with pytest.raises(ImageError, match="local paths are not opened here"):
            open_image(source, limits=ImageLimits(allow_paths=False))


@pytest.mark.parametrize("url", ["ftp://host/a.png", "gopher://x/", "files:///a.png"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ImageError, match=r"is not opened; expected https://"):
        open_image(url)


def test_http_can_be_refused() -> None:
    with pytest.raises(FetchError, match="scheme 'http'; expected https"):
        open_image("http://127.0.0.1:1/a.png", limits=ImageLimits(allow_http=False))


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:image/png;base64,@@@@", "data:image/png;base64,AAAAA"])
def test_broken_data_uris(uri: str) -> None:
    with pytest.raises(ImageError, match="data URI"):
        open_image(uri)


def test_sources_of_other_types() -> None:
    for source in (42, None, [1, 2], object()):
        with pytest.raises(TypeError, match="is not an image source; expected a path"):
            open_image(source)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="open the file in binary mode"):
        open_image(io.StringIO("text"))  # type: ignore[arg-type]


def test_names_appear_in_messages_and_secrets_do_not() -> None:
    with pytest.raises(ImageError, match=r"^image_urls\[1\] \(5 bytes\): not an image"):
        open_image(b"12345", name="image_urls[1]")
    shown = describe_source("https://user:secret@host/a/b.png?signature=secret#x")
    assert shown == "https://host/a/b.png"
    assert len(describe_source("https://host/" + "a" * 5000)) < 100
    assert describe_source(Image.new("RGB", (3, 4))) == "PIL image 3x4 RGB"
    assert describe_source(io.BytesIO(b"")) == "file object"
    assert describe_source("data:image/png;base64,AAAA") == "data URI of 26 characters"


def test_lazily_opened_damaged_pillow_images() -> None:
    data = encoded(flag(200, 200), "JPEG")
    with pytest.raises(ImageError, match="cannot be loaded") as caught:
        open_image(Image.open(io.BytesIO(data[:-400])))
    no_leak(str(caught.value))


@pytest.mark.parametrize(
    "change", [{"max_bytes": 0}, {"max_pixels": -1}, {"deadline_s": float("nan")}, {"decode_deadline_s": 0}]
)
def test_limits_must_be_positive(change: dict[str, float]) -> None:
    make: Callable[..., ImageLimits] = ImageLimits
    with pytest.raises(ValueError, match="must be positive"):
        make(**change)
