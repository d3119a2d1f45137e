"""Picture files made byte by byte: what encoders do not write."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
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


def tiff_file(entries: dict[int, tuple[int, ...]], pieces: list[bytes], order: str = "<", *, big: bool = False) -> bytes:
    """A TIFF of one directory behind its pixels; ``pieces`` are strips, or tiles where the entries give their width."""
    head = 16 if big else 8
    starts = [head + sum(map(len, pieces[:i])) for i in range(len(pieces))]
    places, lengths = (324, 325) if 322 in entries else (273, 279)
    entries = {places: tuple(starts), lengths: tuple(map(len, pieces)), **entries}
    at = head + sum(map(len, pieces))
    at += at % 2
    word, count = ("Q", "Q") if big else ("I", "H")
    behind = at + struct.calcsize(f"={count}") + len(entries) * (20 if big else 12) + struct.calcsize(f"={word}")
    table, arrays = struct.pack(f"{order}{count}", len(entries)), b""
    for code, values in sorted(entries.items()):
        kind, letter = (16, "Q") if big else (4, "I")
        body = struct.pack(f"{order}{len(values)}{letter}", *values)
        table += struct.pack(f"{order}HH{word}", code, kind, len(values))
        if len(body) > (8 if big else 4):
            table, arrays = table + struct.pack(f"{order}{word}", behind + len(arrays)), arrays + body
        else:
            table += body
    mark = b"II" if order == "<" else b"MM"
    start = mark + (struct.pack(f"{order}HHHQ", 43, 8, 0, at) if big else struct.pack(f"{order}HI", 42, at))
    return (start + b"".join(pieces)).ljust(at, b"\0") + table + bytes(8 if big else 4) + arrays


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(image: Image.Image, **options: object) -> bytes:
    """A picture as pillow-heif writes it."""
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def flag(width: int = 40, height: int = 30) -> Image.Image:
    """Left half red, right half blue, top row green: no two corners alike, in few colours."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2] = (200, 10, 10)
    array[:, width // 2 :] = (10, 10, 200)
    array[: height // 5] = (10, 200, 10)
    return Image.fromarray(array)


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """No two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256)
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def further_files(colour: Image.Image, alpha: Image.Image) -> list[bytes]:
    """Sound files of the formats that are read from this machine alone."""
    turned = b"Exif\0\0" + tiff(6)
    files = [encoded(image, "GIF") for image in (colour.quantize(7), alpha.quantize(9), colour.convert("1"))]
    files.append(encoded(colour, "GIF", save_all=True, append_images=[colour.rotate(180)], comment=b"hello", loop=0))
    files += [encoded(image, "BMP") for image in (colour, alpha, colour.convert("L"), colour.quantize(7), colour.convert("1"))]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        files += [
            encoded(image, "TIFF", compression=compression) for image in (colour, alpha.convert("LA"), colour.quantize(7))
        ]
    files.append(encoded(colour, "TIFF", compression="tiff_lzw", tiffinfo={274: 6, 317: 2}, big_tiff=True))
    files.append(encoded(colour, "TIFF", save_all=True, append_images=[colour.convert("CMYK")]))
    tiles = [bytes(range(256)) * 3] * 2
    files.append(tiff_file({256: (20,), 257: (9,), 258: (8,) * 3, 262: (2,), 277: (3,), 322: (16,), 323: (16,)}, tiles, ">"))
    files += [encoded(colour, "AVIF", exif=turned), encoded(alpha, "AVIF"), encoded(colour.convert("L"), "AVIF")]
    files.append(encoded(colour, "AVIF", save_all=True, append_images=[colour.rotate(180)]))
    files += [heic(colour, exif=turned), heic(alpha), heic(gradient(128, 128), tile_size=64, thumbnails=[64])]
    return files
