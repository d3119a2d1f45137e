"""WebP files: the size, EXIF and XMP, read from the container without a decoder (RFC 9649)."""

from __future__ import annotations

from uso_engine.errors import ImageError
from uso_engine.imaging.encoded import EncodedPicture, damaged

MAX_CHUNKS = 100_000
"""An animation has a chunk for each frame; the decoder keeps 64 bytes for each chunk of 8."""


def read_webp(data: bytes, *, label: str) -> EncodedPicture:
    """Read what must be known before the decoder is made, which allocates the whole canvas.

    Args:
        data: starts with ``RIFF``, a length and ``WEBP``.
        label: what error messages call the picture.

    Returns:
        The file as it is; its decoder passes over what it does not need.

    Raises:
        ImageError: no picture chunk, or more than ``MAX_CHUNKS`` chunks.
    """
    exif = xmp = None
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"EXIF":
            exif = exif or data[at + 8 : at + 8 + length]
        elif name == b"XMP ":
            xmp = xmp or data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    else:
        raise ImageError(f"{label}: the WebP image is in more than {MAX_CHUNKS:,} chunks, the most that is accepted")
    # Most writers leave the prefix out that JPEG has; some keep it.
    return EncodedPicture(data, _canvas(data, label), exif and exif.removeprefix(b"Exif\0\0"), xmp)


def _canvas(data: bytes, label: str) -> tuple[int, int]:
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(body) == 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(body) == 10:
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise damaged(label, "WebP", "it does not start with a picture")
