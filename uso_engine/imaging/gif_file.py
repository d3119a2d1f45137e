"""GIF files: the first frame, without comments, application data and later frames (GIF89a specification)."""

from __future__ import annotations

import struct

from uso_engine.errors import ImageError
from uso_engine.imaging.encoded import EncodedPicture, damaged

SIGNATURES = (b"GIF87a", b"GIF89a")

MAX_BLOCKS = 500_000
"""Blocks of at most 255 bytes that are walked through up to the end of the first frame; 122 MB of full ones."""
_SLACK_BYTES = 2**16
_EXTENSION, _IMAGE, _TRAILER, _GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9


def strip_gif(data: bytes, *, label: str) -> EncodedPicture:
    """Keep the header, the palettes, the transparent colour and the pixels of the first frame.

    Args:
        data: starts with one of ``SIGNATURES``.
        label: what error messages call the picture.

    Returns:
        A GIF of one frame, whose size is the screen's, or the frame's where that reaches beyond it, as browsers show it.

    Raises:
        ImageError: broken rules, more than ``MAX_BLOCKS`` blocks, or more compressed data than the frame's pixels can need.
    """
    if len(data) < 13:
        raise damaged(label, "GIF", "it breaks off within its header")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _table_bytes(flags)
    kept, control = [data[:at]], b""
    blocks = 0
    while True:
        kind = data[at] if at < len(data) else _TRAILER
        if kind == _TRAILER:
            raise damaged(label, "GIF", "it has no frame")
        if kind == _IMAGE:
            break
        if kind != _EXTENSION or at + 2 > len(data):
            raise damaged(label, "GIF", f"a block of the unknown kind {kind}")
        end, count = _end_of_blocks(data, at + 2, MAX_BLOCKS - blocks, label)
        if data[at + 1] == _GRAPHIC_CONTROL and data[at + 2] == 4 and end == at + 8:
            control = data[at:end]
        at, blocks = end, blocks + count
    if at + 11 > len(data):
        raise damaged(label, "GIF", "it breaks off within a frame's header")
    left, top, frame_width, frame_height, frame_flags = struct.unpack_from("<HHHHB", data, at + 1)
    start = at + 10 + _table_bytes(frame_flags)
    end, _ = _end_of_blocks(data, start + 1, MAX_BLOCKS - blocks, label)
    packed = end - start
    # A code has at most 12 bits and stands for a pixel or more; twice that leaves room for codes that only start over.
    if packed > 3 * frame_width * frame_height + _SLACK_BYTES:
        raise damaged(label, "GIF", f"{packed:,} bytes of compressed data for {frame_width}x{frame_height} pixels")
    file = b"".join((*kept, control, data[at:end], bytes((_TRAILER,))))
    return EncodedPicture(file, (max(width, left + frame_width), max(height, top + frame_height)))


def _table_bytes(flags: int) -> int:
    """Length of the colour table that a field of flags announces."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _end_of_blocks(data: bytes, at: int, most: int, label: str) -> tuple[int, int]:
    """Where a row of blocks ends, behind the empty one, and how many there are."""
    for count in range(most):
        if at >= len(data):
            raise damaged(label, "GIF", "it breaks off within its blocks")
        length = data[at]
        at += 1 + length
        if length == 0:
            return at, count
    raise ImageError(f"{label}: the GIF image is in more than {MAX_BLOCKS:,} blocks, the most that is accepted; save it anew")
