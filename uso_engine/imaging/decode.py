"""From the bytes of an encoded picture to a loaded Pillow image, without trusting the bytes."""

from __future__ import annotations

import io

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from uso_engine.errors import ImageError

# The decoders themselves rather than Image.open: what is accepted is decided here by content, nothing else is probed, and
# Pillow's process-wide pixel limit (a warning and an error with texts of its own) stays out of the way of ours.
_DECODERS: dict[str, type[ImageFile]] = {"PNG": PngImageFile, "JPEG": JpegImageFile, "WebP": WebPImageFile}

# Things people send instead, so that the message can say what came. (offset, bytes, what it is)
_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF8", "a GIF image"),
    (0, b"BM", "a BMP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\0\0\x01\0", "a Windows icon"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftyphe", "a HEIC image"),
    (4, b"ftypmif1", "a HEIC image"),
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
EXPECTED = "expected PNG, JPEG or WebP"


def decode_image(data: bytes, *, max_pixels: int, label: str) -> Image.Image:
    """Decode the first frame of a PNG, JPEG or WebP picture.

    Args:
        data: the encoded picture.
        max_pixels: the most pixels (width x height) that are decoded; compared with the header before anything is decoded.
        label: what error messages call the picture.

    Returns:
        The loaded image in the mode it was stored in, EXIF not yet applied.

    Raises:
        ImageError: empty, of another format, over ``max_pixels``, truncated or damaged.
    """
    kind = _recognise(data, label)
    if kind == "WebP":  # its decoder allocates the whole canvas when it is made, so the size is read without it
        check_size(_webp_canvas(data, label), max_pixels=max_pixels, label=label)
    size: tuple[int, int] | None = None
    try:
        image = _DECODERS[kind](io.BytesIO(data))
        size = image.size
        check_size(size, max_pixels=max_pixels, label=label)
        image.load()
    except ImageError:
        raise
    except Exception as error:  # decoders meet hostile bytes with any exception there is; none of their texts go further
        of_size = f" of {size[0]}x{size[1]} pixels" if size else ""
        raise ImageError(f"{label}: the {kind} image{of_size} is truncated or damaged and cannot be decoded") from error
    return image


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


def _recognise(data: bytes, label: str) -> str:
    if not data:
        raise ImageError(f"{label}: empty (0 bytes); {EXPECTED}")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    for offset, magic, name in _FOREIGN:
        if data.startswith(magic, offset):
            raise ImageError(f"{label}: {name}; {EXPECTED}")
    head = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _MARKUP:
        if head.startswith(magic):
            raise ImageError(f"{label}: {name}; {EXPECTED}")
    raise ImageError(f"{label}: not an image ({len(data):,} bytes of an unknown kind); {EXPECTED}")


def _webp_canvas(data: bytes, label: str) -> tuple[int, int]:
    """Width and height from the first chunk of a WebP file (WebP container specification, RFC 9649)."""
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(body) == 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(body) == 10:
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ImageError(f"{label}: the WebP image is truncated or damaged and cannot be decoded")
