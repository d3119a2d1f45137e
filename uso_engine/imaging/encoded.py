"""An encoded picture brought down to what its pixels need, so that a decoder's work is bounded by the picture's size."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.errors import ImageError


@dataclass(frozen=True)
class EncodedPicture:
    """A picture file without what its pixels do not need: text, colour profiles, previews, padding, later frames.

    What is left out is skipped and never unpacked: however large it is, it costs neither memory nor time.

    Args:
        data: the file.
        size: width and height in pixels.
        exif: the TIFF structure of its EXIF data, where it has any.
        xmp: the beginning of its XMP packet, where it has one.
        scans: how often the decoder goes over the whole picture.
        orientation: as EXIF has it, where the file says it elsewhere than in its EXIF data; goes before that.
    """

    data: bytes
    size: tuple[int, int]
    exif: bytes | None = None
    xmp: bytes | None = None
    scans: int = 1
    orientation: int | None = None


def damaged(label: str, kind: str, what: str) -> ImageError:
    """The error for a file that breaks its format's rules.

    Args:
        label: what error messages call the picture.
        kind: the format's name.
        what: the rule that is broken, in a few words.
    """
    return ImageError(f"{label}: the {kind} image is truncated or damaged and cannot be decoded ({what})")
