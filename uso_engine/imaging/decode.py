"""From the bytes of an encoded picture to a loaded Pillow image, without trusting the bytes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from PIL import Image, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from uso_engine.errors import BackendError, ImageError
from uso_engine.imaging import bmp_file, gif_file, heif_file, jpeg_file, png_file, tiff_file
from uso_engine.imaging.encoded import EncodedPicture
from uso_engine.imaging.jpeg_file import check_scans
from uso_engine.imaging.orientation import stored_orientation
from uso_engine.imaging.webp_file import read_webp

Formats: TypeAlias = Literal["web", "all"]
"""Which formats are decoded: PNG, JPEG and WebP, or also GIF, BMP, TIFF, AVIF and HEIC."""


def _open_avif(file: io.BytesIO) -> ImageFile:
    if not features.check("avif"):
        raise BackendError("reading AVIF files needs a Pillow that was built with libavif; save the picture as PNG")
    return AvifImageFile(file)


def _open_heic(file: io.BytesIO) -> ImageFile:
    try:
        from pillow_heif import HeifImageFile  # the only reader of HEIC; an extra
    except ImportError as error:
        raise BackendError(
            "reading HEIC files needs pillow-heif, which is not installed (pip install 'uso-engine[heif]'); "
            "or save the picture as PNG or JPEG"
        ) from error
    image: ImageFile = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return image


# The decoders themselves rather than Image.open: what is accepted is decided here by content, nothing else is probed, and
# Pillow's process-wide pixel limit (a warning and an error with texts of its own) stays out of the way of ours.
_DECODERS: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "AVIF": _open_avif,
    "HEIC": _open_heic,
}
_STRIPPERS: dict[str, Callable[..., EncodedPicture]] = {
    "PNG": png_file.strip_png,
    "JPEG": jpeg_file.strip_jpeg,
    "WebP": read_webp,
    "GIF": gif_file.strip_gif,
    "BMP": bmp_file.read_bmp,
    "TIFF": tiff_file.strip_tiff,
    "HEIC": heif_file.strip_heif,
}
_WEB = ("PNG", "JPEG", "WebP")
_EXPECTED: dict[Formats, str] = {
    "web": "expected PNG, JPEG or WebP, the formats that URLs and data URIs may lead to",
    "all": "expected PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC",
}

# Things people send instead, so that the message can say what came. (offset, bytes, what it is)
_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\0\0\x01\0", "a Windows icon"),
    (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "gzip-compressed data"),
)
_MARKUP: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing"),
    (b"<html", "an HTML page"),
    (b"<!doctype html", "an HTML page"),
    (b"<?xml", "an XML document"),
    (b"{", "JSON or text"),
)


class _Deadline(io.BytesIO):
    """A file that cannot be read any more once its time is over. Decoders read block by block."""

    def __init__(self, data: bytes, seconds: float, label: str) -> None:
        super().__init__(data)
        self._seconds, self._label = seconds, label
        self._end = time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._end:
            raise ImageError(f"{self._label}: decoding it took longer than {self._seconds:g} s")
        return super().read(size)


def decode_image(
    data: bytes, *, max_pixels: int, label: str, deadline_s: float = 10.0, formats: Formats = "all"
) -> tuple[Image.Image, int]:
    """Decode a picture, of several frames or pages the first.

    What decoding costs is bounded by the picture's size: the decoder is not shown what pixels do not need, and files that make
    much of it are refused. ``deadline_s`` ends what is left.

    Args:
        data: the encoded picture.
        max_pixels: the most pixels (width x height) that are decoded; compared with the header before anything is decoded.
        label: what error messages call the picture.
        deadline_s: the most seconds for decoding.
        formats: which are decoded.

    Returns:
        The loaded image in the mode it was stored in, and the EXIF orientation, not yet applied.

    Raises:
        ImageError: empty, of another format, over ``max_pixels`` or ``deadline_s``, truncated or damaged.
        BackendError: a format that needs a package which is not installed.
    """
    kind = _recognise(data, label, formats)
    picture = _STRIPPERS[kind](data, label=label)
    check_size(picture.size, max_pixels=max_pixels, label=label)
    if kind == "JPEG":
        check_scans(picture, label=label)
    if kind == "HEIC" and not heif_file.is_hevc(picture):
        kind = "AVIF"
    try:
        image = _DECODERS[kind](_Deadline(picture.data, deadline_s, label))
        check_size(image.size, max_pixels=max_pixels, label=label)
        image.load()
    except (ImageError, BackendError, MemoryError):
        raise
    except Exception as error:  # decoders meet hostile bytes with any exception there is; none of their texts go further
        width, height = picture.size
        raise ImageError(
            f"{label}: the {kind} image of {width}x{height} pixels is truncated or damaged and cannot be decoded"
        ) from error
    return image, stored_orientation(picture, label=label)


def check_size(size: tuple[int, int], *, max_pixels: int, label: str) -> None:
    """Refuse a picture without pixels or with too many.

    Args:
        size: width, height in pixels.
        max_pixels: the limit on width x height.
        label: what error messages call the picture.

    Raises:
        ImageError: a side is under 1 pixel, or the picture has more than ``max_pixels`` pixels.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{label}: an image of {width}x{height} pixels; expected at least 1x1")
    if width * height > max_pixels:
        raise ImageError(
            f"{label}: {width}x{height} is {width * height:,} pixels; at most {max_pixels:,} are accepted: scale it down first"
        )


def _recognise(data: bytes, label: str, formats: Formats) -> str:
    """The format, by the first bytes; AVIF is found within what is called HEIC here, by the kind of its items."""
    expected = _EXPECTED[formats]
    if not data:
        raise ImageError(f"{label}: empty (0 bytes); {expected}")
    kind = _kind(data)
    if kind in _WEB or (kind and formats == "all"):
        return kind
    if kind:
        name = "AVIF" if data[8:11] == b"avi" else kind
        raise ImageError(f"{label}: {'an' if name == 'AVIF' else 'a'} {name} image; {expected}")
    for offset, magic, name in _FOREIGN:
        if data.startswith(magic, offset):
            raise ImageError(f"{label}: {name}; {expected}")
    head = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _MARKUP:
        if head.startswith(magic):
            raise ImageError(f"{label}: {name}; {expected}")
    raise ImageError(f"{label}: not an image ({len(data):,} bytes of an unknown kind); {expected}")


def _kind(data: bytes) -> str:
    """The format that the first bytes are those of; empty for none that is read."""
    signatures: tuple[tuple[str, int, tuple[bytes, ...]], ...] = (
        ("PNG", 0, (png_file.SIGNATURE,)),
        ("JPEG", 0, (jpeg_file.SIGNATURE,)),
        ("GIF", 0, gif_file.SIGNATURES),
        ("BMP", 0, (bmp_file.SIGNATURE,)),
        ("TIFF", 0, tiff_file.SIGNATURES),
        ("HEIC", 8, heif_file.BRANDS if data[4:8] == b"ftyp" else ()),
    )
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    return next((kind for kind, offset, heads in signatures if data.startswith(heads, offset)), "")
