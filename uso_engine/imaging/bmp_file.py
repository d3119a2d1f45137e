"""BMP files: what the header says, checked against the file before a decoder sees it (Microsoft, Bitmap Storage)."""

from __future__ import annotations

import struct

from uso_engine.errors import ImageError
from uso_engine.imaging.encoded import EncodedPicture, damaged

SIGNATURE = b"BM"

_CORE, _HEADERS = 12, (40, 52, 56, 64, 108, 124)
_PLAIN, _MASKS = 0, 3
_COMPRESSIONS = {1: "run lengths (RLE8)", 2: "run lengths (RLE4)", 4: "JPEG", 5: "PNG", 6: "masks with alpha"}
# Where red, green, blue and alpha are in a pixel's bits: what the decoder knows.
_LAYOUTS: dict[int, set[tuple[int, ...]]] = {
    16: {(0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)},
    24: {(0xFF0000, 0xFF00, 0xFF)},
    32: {
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF00, 0xFF, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
    },
}


def read_bmp(data: bytes, *, label: str) -> EncodedPicture:
    """Read what must be known before the decoder is made. Only pixels stored as they are get through, all of them present.

    Args:
        data: starts with ``SIGNATURE``.
        label: what error messages call the picture.

    Returns:
        The file as it is.

    Raises:
        ImageError: broken rules, compressed pixels, or a layout of colours that is not read.
    """
    if len(data) < 26:
        raise damaged(label, "BMP", "it breaks off within its header")
    start, header = struct.unpack_from("<II", data, 10)
    if header != _CORE and header not in _HEADERS:
        raise damaged(label, "BMP", f"a header of {header} bytes")
    if 14 + header > len(data):
        raise damaged(label, "BMP", "it breaks off within its header")
    compression, colours = _PLAIN, 0
    if header == _CORE:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, 18)
    else:
        width, height, planes, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
    if compression not in (_PLAIN, _MASKS):
        how = _COMPRESSIONS.get(compression, f"method {compression}")
        raise ImageError(f"{label}: a BMP image compressed by {how}; expected one without compression: save it as PNG")
    # A height of 256 times 65,536 under zero is where the decoder stops telling rows from the top from rows from the bottom.
    if width < 1 or height == 0 or height <= -(2**24) or planes != 1 or bits not in (1, 4, 8, 16, 24, 32):
        raise damaged(label, "BMP", f"{width}x{height} pixels in {planes} planes of {bits} bits")
    if compression == _MASKS:
        _check_masks(data, header, bits, label)
    table_end = _table_end(header, bits, colours, compression, label)
    start = max(start, table_end) if start == 0 else start
    if start < table_end:
        raise damaged(label, "BMP", f"its pixels start at byte {start}, before its palette ends")
    row_bytes = (width * bits + 31) // 32 * 4
    if start + row_bytes * abs(height) > len(data):
        raise damaged(label, "BMP", f"{max(len(data) - start, 0):,} bytes of pixels; expected {row_bytes * abs(height):,}")
    return EncodedPicture(data, (width, abs(height)))


def _check_masks(data: bytes, header: int, bits: int, label: str) -> None:
    """Headers of 40 bytes are followed by three masks, longer ones hold them, and alpha's from 56 bytes on."""
    if header == 40 and len(data) < 66:
        raise damaged(label, "BMP", "it breaks off within its masks")
    count = 4 if bits == 32 and header >= 56 else 3
    masks = struct.unpack_from(f"<{count}I", data, 54)
    if bits == 32 and count == 3:
        masks = (*masks, 0)
    if bits not in _LAYOUTS or masks not in _LAYOUTS[bits]:
        shown = ", ".join(f"{mask:#x}" for mask in masks)
        raise ImageError(
            f"{label}: a BMP image of {bits} bits with the colour masks {shown}, which are not read; save it as PNG"
        )


def _table_end(header: int, bits: int, colours: int, compression: int, label: str) -> int:
    """The first byte behind header, masks and palette."""
    end = 14 + header + (12 if compression == _MASKS and header == 40 else 0)
    if bits > 8:
        return end
    if colours > 1 << bits:
        raise damaged(label, "BMP", f"a palette of {colours:,} colours for pixels of {bits} bits")
    return end + (3 if header == _CORE else 4) * (colours or 1 << bits)
