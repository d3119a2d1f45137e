"""The formats that results are written in, and the endings of their files. Light to import: the command line uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

OutputFormat: TypeAlias = Literal["png", "jpeg", "webp"]
"""PNG and JPEG are the hosted API's; WebP is for files alone."""

CONTENT_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ENDINGS = ".png, .jpg, .jpeg or .webp"
"""The endings, for messages."""


def output_format_of(path: Path) -> OutputFormat:
    """The format that a file name asks for.

    Args:
        path: ends in one of ``SUFFIXES``.

    Returns:
        The format.

    Raises:
        ValueError: another ending.
    """
    output_format = SUFFIXES.get(path.suffix.lower())
    if output_format is None:
        raise ValueError(f"'{path.name}' ends in {path.suffix or 'nothing'!r}; expected {ENDINGS}")
    return output_format
