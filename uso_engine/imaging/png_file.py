"""PNG files: which chunks the pixels need (PNG specification, third edition)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from uso_engine.errors import ImageError
from uso_engine.imaging.encoded import EncodedPicture, damaged

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_CHUNKS = 100_000
"""Files of 50 MiB in chunks of 512 bytes have as many; each costs about a microsecond here, and ten in the decoder."""
_SLACK_BYTES = 2**16
"""Compressed pixels may have twice as many bytes as the pixels themselves, and this. Compression adds a thousandth at most
where there is nothing to gain; only blocks without contents, which cost a decoder more than pixels do, take more."""
_MAX_TEXT_BYTES = 2**20
"""Of compressed text at most this much is unpacked, to look for an orientation in it."""
_GREY, _RGB, _PALETTE = 0, 2, 3
_SAMPLES = {_GREY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def strip_png(data: bytes, *, label: str) -> EncodedPicture:
    """Keep the header, the palette, the transparency and the pixels of the first frame, those in one chunk.

    Args:
        data: starts with ``SIGNATURE``.
        label: what error messages call the picture.

    Returns:
        The same picture, whose decoding costs what its pixels cost.

    Raises:
        ImageError: broken rules that the decoder would not notice, or more than ``MAX_CHUNKS`` chunks.
    """
    found: dict[bytes, bytes] = {}
    pixels: list[memoryview] = []
    exif = xmp = None
    after_pixels = False
    for name, body in _chunks(data, label):
        if name == b"IDAT":
            if not after_pixels:
                pixels.append(body)
            continue
        after_pixels = after_pixels or bool(pixels)
        if name in (b"IHDR", b"PLTE", b"tRNS") and not after_pixels:
            if name in found:
                raise damaged(label, "PNG", f"two {name.decode()} chunks")
            found[name] = bytes(body)
        elif name == b"eXIf":
            exif = exif or bytes(body)
        elif name in (b"iTXt", b"zTXt", b"tEXt"):
            keyword, text = _text(name, body)
            if keyword == b"XML:com.adobe.xmp":
                xmp = xmp or text
            elif keyword == b"Raw profile type exif":
                exif = exif or _exif_of_profile(text)
    size = _check_header(found, sum(map(len, pixels)), label)
    kept = [_chunk(name, found[name]) for name in (b"IHDR", b"PLTE", b"tRNS") if name in found]
    file = b"".join((SIGNATURE, *kept, _chunk(b"IDAT", b"".join(pixels)), _chunk(b"IEND", b"")))
    return EncodedPicture(file, size, exif, xmp)


def _chunks(data: bytes, label: str) -> Iterator[tuple[bytes, memoryview]]:
    """Names and bodies of the chunks up to the end; the checksums of those that the pixels need are checked."""
    view, at = memoryview(data), len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if at == len(data):  # Nothing but the end mark is missing: all of the picture may be there.
            return
        if at + 12 > len(data):
            raise damaged(label, "PNG", "it breaks off between two chunks")
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            raise damaged(label, "PNG", "it breaks off within a chunk")
        if at == len(SIGNATURE) and name != b"IHDR":
            raise damaged(label, "PNG", "it does not start with IHDR")
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end]
        ):
            raise damaged(label, "PNG", f"the checksum of {name.decode()} is wrong")
        if name == b"IEND":
            return
        yield name, view[at + 8 : end - 4]
        at = end
    raise ImageError(f"{label}: the PNG image is in more than {MAX_CHUNKS:,} chunks, the most that is accepted; save it anew")


def _check_header(found: dict[bytes, bytes], packed_bytes: int, label: str) -> tuple[int, int]:
    """Check header, pixels, palette and transparency against each other; correct the transparency for the decoder."""
    header = found.get(b"IHDR", b"")
    if len(header) != 13:
        raise damaged(label, "PNG", f"IHDR has {len(header)} bytes; expected 13")
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    if depth not in _DEPTHS.get(colour, ()):
        raise damaged(label, "PNG", f"there is no colour type {colour} with {depth} bits")
    # Interlaced pictures have up to two rows, with a filter byte each, where others have one.
    plain_bytes = 2 * height * (1 + -(-width * depth * _SAMPLES[colour] // 8))
    if packed_bytes > 2 * plain_bytes + _SLACK_BYTES:
        raise damaged(label, "PNG", f"{packed_bytes:,} bytes of compressed data for {width}x{height} pixels")
    palette = found.get(b"PLTE", b"")
    if colour == _PALETTE and (not palette or len(palette) % 3 or len(palette) > 3 << depth):
        raise damaged(label, "PNG", f"a palette of {len(palette)} bytes; expected 3 to {3 << depth}, a multiple of 3")
    if colour != _PALETTE:
        found.pop(b"PLTE", None)  # a suggestion for old screens
    if colour not in (_GREY, _RGB, _PALETTE):
        found.pop(b"tRNS", None)  # meaningless beside an alpha channel
    if b"tRNS" in found:
        found[b"tRNS"] = _transparency(found[b"tRNS"], colour, depth, len(palette) // 3, label)
    return width, height


def _transparency(body: bytes, colour: int, depth: int, colours: int, label: str) -> bytes:
    if colour == _PALETTE:
        if not 1 <= len(body) <= colours:
            raise damaged(label, "PNG", f"tRNS has {len(body)} entries; the palette has {colours}")
        return body
    expected = 2 if colour == _GREY else 6
    if len(body) != expected:
        raise damaged(label, "PNG", f"tRNS has {len(body)} bytes; expected {expected}")
    values = struct.unpack(f">{len(body) // 2}H", body)
    if max(values) >> depth:
        raise damaged(label, "PNG", f"tRNS names the value {max(values)}, which {depth} bits cannot hold")
    # The decoder compares with samples it has already brought to 8 bits.
    if colour == _GREY and depth in (2, 4):
        values = tuple(value * 255 // ((1 << depth) - 1) for value in values)
    elif colour == _RGB and depth == 16:
        values = tuple(value >> 8 for value in values)
    return struct.pack(f">{len(values)}H", *values)


def _text(name: bytes, body: memoryview) -> tuple[bytes, bytes]:
    """Keyword and beginning of the text; empty where they cannot be read, for text is not what a picture is judged by."""
    keyword, _, rest = bytes(body[:80]).partition(b"\0")
    if keyword not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        return b"", b""
    rest = bytes(body[len(keyword) + 1 :])
    compressed = name == b"zTXt"
    if name == b"zTXt":
        rest = rest[1:]
    elif name == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:]
        rest = rest.split(b"\0", 2)[-1]  # after language and translated keyword
    if not compressed:
        return keyword, rest[:_MAX_TEXT_BYTES]
    try:
        return keyword, zlib.decompressobj().decompress(rest, _MAX_TEXT_BYTES)
    except zlib.error:
        return b"", b""


def _exif_of_profile(text: bytes) -> bytes | None:
    """EXIF as ImageMagick writes it: a newline, "exif", the length, then lines of hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii"))
    except ValueError:
        return None


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
