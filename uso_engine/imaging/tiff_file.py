"""TIFF files: the first picture, written anew with the few entries that its pixels need (TIFF 6.0; BigTIFF)."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.errors import ImageError
from uso_engine.imaging import tiff_tags as tag
from uso_engine.imaging.encoded import EncodedPicture, damaged
from uso_engine.imaging.tiff_tags import Directory

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_SLACK_BYTES, _SLACK_PER_PIECE = 2**16, 64
_SLACK_PIXELS = 2**22
"""Tiles may have four times as many pixels as the picture, and this: one tile of 2048x2048 around a small picture."""
_PLAIN = 1
_PACKED = {5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
_OTHER = {
    2: "fax",
    3: "fax",
    4: "fax",
    6: "JPEG",
    7: "JPEG",
    34712: "JPEG 2000",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
}
_OTHER |= {32809: "ThunderScan", 34676: "SGILog", 34677: "SGILog", 34887: "LERC", 52546: "JPEG XL"}
_WHITE_IS_0, _BLACK_IS_0, _RGB, _PALETTE, _INK = 0, 1, 2, 3, 5
_COLOURS = {4: "a mask", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 32803: "a camera's colour filter", 34892: "linear raw"}
# What the samples of a pixel mean -> bits of each that are read, with and without a further sample for transparency.
_BITS = {_WHITE_IS_0: (1, 2, 4, 8), _BLACK_IS_0: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _INK: (8, 16)}
_BITS_WITH_ALPHA = {_BLACK_IS_0: (8,), _RGB: (8, 16)}
_SAMPLES = {_WHITE_IS_0: 1, _BLACK_IS_0: 1, _RGB: 3, _PALETTE: 1, _INK: 4}


@dataclass(frozen=True)
class _Layout:
    """How the pixels are stored: bits of one row of one plane, and the size and number of the pieces they are in."""

    bits: int
    samples: int
    planes: int
    piece: tuple[int, int]
    pieces: int

    def piece_bytes(self, rows: int) -> int:
        """Bytes of so many rows of a piece, decoded."""
        return rows * -(-self.piece[0] * self.bits * (self.samples // self.planes) // 8)


def strip_tiff(data: bytes, *, label: str) -> EncodedPicture:
    """Keep the first directory's pixels and what it says about them; later pictures, metadata and profiles are not looked at.

    Args:
        data: starts with one of ``SIGNATURES``.
        label: what error messages call the picture.

    Returns:
        A TIFF of one directory, whose strips or tiles hold no more than the picture needs.

    Raises:
        ImageError: broken rules, or a compression, colour space or sample format that is not read.
    """
    directory = tag.read_directory(data, label=label)
    if directory.has(tag.DNG_VERSION) or directory.one(tag.KIND, 0) & 1:
        raise ImageError(
            f"{label}: a camera's raw file, or a TIFF that begins with a preview; expected a picture: export it as one"
        )
    width, height = directory.one(tag.WIDTH), directory.one(tag.HEIGHT)
    if not 1 <= width < 2**31 or not 1 <= height < 2**31:
        raise damaged(label, "TIFF", f"{width}x{height} pixels")
    compression = directory.one(tag.COMPRESSION, _PLAIN)
    if compression != _PLAIN and compression not in _PACKED:
        how = _OTHER.get(compression, f"method {compression}")
        raise ImageError(f"{label}: a TIFF image compressed by {how}; expected none, LZW, deflate or PackBits: save it as PNG")
    layout = _layout(directory, width, height, label)
    _check_samples(directory, layout, label)
    pieces = _pieces(directory, layout, data, compression, (width, height), label)
    orientation = directory.one(tag.ORIENTATION, 1)
    return EncodedPicture(_written(directory, pieces, layout.piece[1]), (width, height), orientation=orientation)


def _layout(directory: Directory, width: int, height: int, label: str) -> _Layout:
    samples, planes = directory.one(tag.SAMPLES, 1), 1
    bits = directory.many(tag.BITS, (1,) * min(samples, 4))
    if samples not in (1, 2, 3, 4) or len(bits) != samples or len(set(bits)) != 1 or not 1 <= bits[0] <= 64:
        raise ImageError(f"{label}: a TIFF image of {samples} samples with {', '.join(map(str, bits[:9]))} bits is not read")
    if directory.one(tag.PLANES, 1) == 2:
        planes = samples
    if not directory.has(tag.TILE_WIDTH):
        rows = min(max(directory.one(tag.STRIP_ROWS, height), 1), height)
        return _Layout(bits[0], samples, planes, (width, rows), -(-height // rows) * planes)
    across, down = directory.one(tag.TILE_WIDTH), directory.one(tag.TILE_HEIGHT)
    if across < 1 or down < 1 or across % 16 or down % 16:
        raise damaged(label, "TIFF", f"tiles of {across}x{down}; expected multiples of 16")
    pieces = -(-width // across) * -(-height // down)
    if pieces * across * down > 4 * width * height + _SLACK_PIXELS:
        raise damaged(label, "TIFF", f"{pieces:,} tiles of {across}x{down} for {width}x{height} pixels")
    return _Layout(bits[0], samples, planes, (across, down), pieces * planes)


def _check_samples(directory: Directory, layout: _Layout, label: str) -> None:
    """Refuse what the decoder would not know, or would take for something else."""
    colour = directory.one(tag.COLOUR, -1)
    if colour not in _SAMPLES:
        what = _COLOURS.get(colour, f"kind {colour}")
        raise ImageError(f"{label}: a TIFF image in {what}; expected grey, RGB, CMYK or a palette: save it as PNG")
    more = layout.samples - _SAMPLES[colour]
    extra = directory.many(tag.EXTRA, ())
    announced = len(extra) == more or (colour == _RGB and not extra)  # many writers leave it out beside RGB
    formats = set(directory.many(tag.FORMAT, (1,)))
    readable = _BITS_WITH_ALPHA.get(colour, ()) if more == 1 else _BITS[colour] if more == 0 else ()
    if formats != {1} or layout.bits not in readable or not announced or not set(extra) <= {0, 1, 2}:
        kind = "float" if 3 in formats else "signed" if 2 in formats else "unsigned"
        raise ImageError(
            f"{label}: a TIFF image of {layout.samples} {kind} samples of {layout.bits} bits is not read; save it with 8 bits"
        )
    for name, code, expected in (
        ("fill order", tag.FILL_ORDER, (1,)),
        ("inks", tag.INKS, (1,)),
        ("planes", tag.PLANES, (1, 2)),
    ):
        if directory.one(code, 1) not in expected:
            raise ImageError(f"{label}: a TIFF image of {name} {directory.one(code)} is not read; save it as PNG")
    palette = directory.many(tag.PALETTE, ())
    if colour == _PALETTE and (len(palette) != 3 << layout.bits or max(palette) > 0xFFFF):
        raise damaged(label, "TIFF", f"a palette of {len(palette)} numbers; expected {3 << layout.bits} of 16 bits")
    if directory.one(tag.PREDICTOR, 1) not in ((1, 2) if layout.bits in (8, 16) else (1,)):
        raise damaged(label, "TIFF", f"predictor {directory.one(tag.PREDICTOR)} for samples of {layout.bits} bits")


def _pieces(
    directory: Directory, layout: _Layout, data: bytes, compression: int, size: tuple[int, int], label: str
) -> list[bytes]:
    """The strips or tiles, each as long as a decoder could need it, all within the file."""
    tiled = directory.has(tag.TILE_WIDTH)
    offsets = directory.many(tag.TILE_OFFSETS if tiled else tag.STRIP_OFFSETS, ())
    counts = directory.many(tag.TILE_COUNTS if tiled else tag.STRIP_COUNTS, ())
    if len(offsets) < layout.pieces or len(counts) < layout.pieces:
        raise damaged(label, "TIFF", f"{min(len(offsets), len(counts)):,} strips or tiles; expected {layout.pieces:,}")
    per_plane = layout.pieces // layout.planes
    found, total, plain_total = [], 0, 0
    for number in range(layout.pieces):
        rows = layout.piece[1]
        if not tiled:
            rows = min(rows, size[1] - number % per_plane * rows)
        plain, start, count = layout.piece_bytes(rows), offsets[number], counts[number]
        if compression == _PLAIN and count >= plain:
            count = plain
        if count < (plain if compression == _PLAIN else 1) or start + count > len(data):
            raise damaged(label, "TIFF", f"strip or tile {number} is {count:,} bytes at {start:,}, the file has {len(data):,}")
        total, plain_total = total + count, plain_total + plain
        if total > len(data) or total > 2 * plain_total + _SLACK_BYTES + _SLACK_PER_PIECE * layout.pieces:
            raise damaged(label, "TIFF", f"{total:,} bytes of strips or tiles for {plain_total:,} bytes of pixels")
        found.append(data[start : start + count])
    return found


def _written(directory: Directory, pieces: list[bytes], rows: int) -> bytes:
    """A file of one directory with the pieces one after the other."""
    tiled = directory.has(tag.TILE_WIDTH)
    kept = {code: directory.values[code] for code in tag.KEPT if code in directory.values}
    kept |= {code: values[:1] for code, values in kept.items() if code not in (tag.BITS, tag.PALETTE, tag.EXTRA)}
    if not tiled:
        kept[tag.STRIP_ROWS] = (rows,)
    if kept[tag.COLOUR][0] != _PALETTE:
        kept.pop(tag.PALETTE, None)
    kept[tag.TILE_COUNTS if tiled else tag.STRIP_COUNTS] = tuple(map(len, pieces))
    places = tag.TILE_OFFSETS if tiled else tag.STRIP_OFFSETS
    start = tag.written_bytes({**kept, places: (0,) * len(pieces)})
    offsets = []
    for piece in pieces:
        offsets.append(start)
        start += len(piece)
    return tag.write_directory(directory.order, {**kept, places: tuple(offsets)}) + b"".join(pieces)
