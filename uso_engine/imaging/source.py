"""What a picture may be given as, and how a message names it. Light to import: requests use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image

ImageSource: TypeAlias = str | Path | bytes | BinaryIO | Image.Image

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def describe_source(source: ImageSource) -> str:
    """Name a source in a few words, without query strings, object addresses or the bytes themselves.

    Args:
        source: anything ``open_image`` takes.

    Returns:
        At most about 100 characters, for messages and logs.
    """
    if isinstance(source, Image.Image):
        return f"PIL image {source.width}x{source.height} {source.mode}"
    if isinstance(source, bytes):
        return f"{len(source):,} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"data URI of {len(source):,} characters"
    if isinstance(source, str) and SCHEME.match(source):
        without_query = re.split(r"[?#]", source, maxsplit=1)[0]
        return _shorten(re.sub(r"//[^/@]*@", "//", without_query))
    if isinstance(source, (str, Path)):
        return f"'{_shorten(str(source))}'"
    file_name = getattr(source, "name", None)
    return f"file '{_shorten(file_name)}'" if isinstance(file_name, str) else "file object"


def _shorten(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text[:200])
    return printable if len(printable) <= 90 else f"{printable[:44]}…{printable[-44:]}"
