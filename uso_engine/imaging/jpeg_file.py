"""JPEG files: which segments the pixels need (ITU-T T.81)."""

from __future__ import annotations

import re

from uso_engine.errors import ImageError
from uso_engine.imaging.encoded import EncodedPicture, damaged

SIGNATURE = b"\xff\xd8\xff"

MAX_SEGMENTS = 10_000
"""Photographs have tens, those with a depth map in them hundreds."""
MAX_SCANNED_PIXELS = 2**31
"""Scans x pixels: 32 scans at 8192x8192, more for smaller pictures. Encoders write 10 to 20 scans."""
# The byte before a marker's code may be repeated as padding: the last repetition counts.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
# In compressed data 0xff stands before 0 (a data byte), before a restart marker, or before the next segment.
_END_OF_SCAN = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_PADDING = re.compile(rb"\xff{2,}")
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_ALONE = {0x01, *range(0xD0, 0xD8), _START}  # no length and no body follow these
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_COMMENT = 0xFE
_APPLICATION = range(0xE0, 0xF0)
# What tells the decoder how colours are stored. All else in application segments is for other readers.
_COLOUR_HINTS = (b"JFIF\0", b"Adobe")
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def strip_jpeg(data: bytes, *, label: str) -> EncodedPicture:
    """Keep what decoding needs, without comments, application data, padding, and whatever follows the picture's end.

    Args:
        data: starts with ``SIGNATURE``.
        label: what error messages call the picture.

    Returns:
        The same picture, whose decoding costs what its pixels cost.

    Raises:
        ImageError: broken rules, more than ``MAX_SEGMENTS`` segments, or more than ``MAX_SCANNED_PIXELS``.
    """
    kept, at, scans, size = [b"\xff\xd8"], 2, 0, None
    exif = xmp = None
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:  # Without an end mark all of the picture may be there: the decoder will see.
            break
        marker, at = found[1][0], found.end()
        if marker == _END:
            kept.append(b"\xff\xd9")
            break
        if marker in _ALONE:
            kept.append(bytes((0xFF, marker)))
            continue
        end = at + int.from_bytes(data[at : at + 2])
        if end < at + 2 or end > len(data):
            raise damaged(label, "JPEG", "it breaks off within a segment")
        body, segment, at = data[at + 2 : end], data[found.start() : end], end
        if marker in _APPLICATION or marker == _COMMENT:
            if body.startswith(_COLOUR_HINTS):
                kept.append(segment)
            elif marker == 0xE1 and body.startswith(_EXIF):
                exif = exif or body[len(_EXIF) :]
            elif marker == 0xE1 and body.startswith(_XMP):
                xmp = xmp or body[len(_XMP) :]
            continue
        kept.append(segment)
        if marker in _FRAMES:
            size = _frame_size(body, size, label)
        elif marker == _SCAN:
            scans += 1
            stop = _END_OF_SCAN.search(data, at)
            # A decoder that is fed block by block starts padding over with every block.
            kept.append(_PADDING.sub(b"\xff", data[at : stop.start() if stop else len(data)]))
            at = stop.start() if stop else len(data)
    else:
        raise ImageError(f"{label}: the JPEG image is in more than {MAX_SEGMENTS:,} segments, the most that is accepted")
    if size is None or not scans:
        raise damaged(label, "JPEG", "it has no frame header" if size is None else "it has no scan")
    return EncodedPicture(b"".join(kept), size, exif, xmp, scans)


def check_scans(picture: EncodedPicture, *, label: str) -> None:
    """Refuse a picture whose decoder would go over it too often.

    Raises:
        ImageError: more than ``MAX_SCANNED_PIXELS``.
    """
    width, height = picture.size
    if picture.scans * width * height > MAX_SCANNED_PIXELS:
        raise ImageError(
            f"{label}: the JPEG image of {width}x{height} pixels is in {picture.scans:,} scans; "
            f"at most {MAX_SCANNED_PIXELS // (width * height):,} are accepted at that size: save it anew"
        )


def _frame_size(body: bytes, before: tuple[int, int] | None, label: str) -> tuple[int, int]:
    if before is not None:
        raise damaged(label, "JPEG", "two frame headers")
    if len(body) < 6:
        raise damaged(label, "JPEG", f"a frame header of {len(body)} bytes")
    return int.from_bytes(body[3:5]), int.from_bytes(body[1:3])
