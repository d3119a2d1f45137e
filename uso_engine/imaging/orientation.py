"""How a stored picture is turned upright, from its EXIF or XMP data, in bounded work whatever they claim.

A general EXIF reader copies what every entry points to; entries that all point to the same megabyte make it copy gigabytes.
"""

from __future__ import annotations

import logging
import re
import struct

from PIL import ExifTags, Image

from uso_engine.imaging.encoded import EncodedPicture

logger = logging.getLogger(__name__)

UPRIGHT = 1
_SHORT = 3
_IN_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_XMP_BYTES = 2**20


def stored_orientation(picture: EncodedPicture, *, label: str) -> int:
    """The orientation of an encoded picture; EXIF goes before XMP.

    Args:
        picture: with its EXIF and XMP data, if it has any.
        label: what log messages call it.

    Returns:
        1 to 8 (EXIF 2.32, tag 0x0112); 1, upright, where none is given or the data is damaged, which is logged.
    """
    if picture.orientation is not None:
        return picture.orientation
    found = None
    if picture.exif:
        try:
            found = _in_tiff(picture.exif)
        except (struct.error, ValueError) as error:
            _warn(label, error)
    if found is None and picture.xmp:
        match = _IN_XMP.search(picture.xmp, 0, _XMP_BYTES)
        found = int(match[1]) if match else None
    return UPRIGHT if found is None else found


def orientation_of(image: Image.Image, *, label: str) -> int:
    """The orientation of a Pillow image that a caller opened or made, who may have set it.

    Args:
        image: any.
        label: what log messages call it.

    Returns:
        As `stored_orientation`.
    """
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception as error:  # noqa: BLE001 - damaged metadata around sound pixels raises anything; viewers show it all the same
        _warn(label, error)
        return UPRIGHT


def _in_tiff(tiff: bytes) -> int | None:
    """The tag in the first directory of a TIFF structure (TIFF 6.0, section 2)."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no TIFF header")
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(count):
        tag, kind, _ = struct.unpack_from(f"{order}HHI", tiff, start + 2 + 12 * entry)
        if tag == ExifTags.Base.Orientation and kind == _SHORT:
            return int(struct.unpack_from(f"{order}H", tiff, start + 10 + 12 * entry)[0])
    return None


def _warn(label: str, error: Exception) -> None:
    logger.warning("%s: its EXIF data is damaged (%s); taken as upright", label, type(error).__name__)
