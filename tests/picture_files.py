"""Picture files made byte by byte: what encoders do not write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def chunk(name: bytes, body: bytes = b"", *, checksum: int | None = None) -> bytes:
    """A PNG chunk, with a checksum of its own if one is given."""
    right = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", right if checksum is None else checksum)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG whose rows are given with their filter bytes; ``before`` and ``after`` stand around the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_SIGNATURE + header + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND")


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG segment."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def tiff(orientation: int, order: str = "<", *, kind: int = 3) -> bytes:
    """A TIFF structure with three entries, the second of them the orientation."""
    entries = [(0x010F, 2, 1, 0), (0x0112, kind, 1, orientation << (16 if order == ">" else 0)), (0x0131, 2, 1, 0)]
    head = b"II*\0" if order == "<" else b"MM\0*"
    return (
        head + struct.pack(f"{order}IH", 8, 3) + b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries) + bytes(4)
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """No two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256)
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))
