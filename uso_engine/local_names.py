"""What people write for a path: ``~`` for their home, and ``file:`` before it where they are used to a scheme."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from urllib.parse import unquote

_FILE = re.compile(r"file:(?://(?P<host>[^/]*)(?=/|$))?", re.IGNORECASE)

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def has_file_scheme(text: str) -> bool:
    """Whether a text begins with ``file:``."""
    return text[:5].lower() == "file:"


def is_local_name(text: str) -> bool:
    """Whether a text names a file of this machine, and no URL or data URI."""
    return text[:5].lower() != "data:" and (_SCHEME.match(text) is None or has_file_scheme(text))


def local_name(text: str) -> Path:
    """The path that a text means: without ``file:``, its percent signs decoded, and with the home folder for ``~``.

    Args:
        text: a path, or ``file:relative``, ``file:/absolute``, ``file:///absolute``, ``file://localhost/absolute``.

    Raises:
        ValueError: a file on another machine, or the home folder of somebody who is not known.
    """
    match = _FILE.match(text)
    if match is not None:
        if (match["host"] or "localhost").lower() != "localhost":
            raise ValueError(f"a file on the machine {match['host'][:80]!r}; expected file:///PATH")
        text = unquote(text[match.end() :], errors="surrogateescape")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home folder in {text!r:.100} is not known") from error


def written_path(name: str, path: object) -> Path:
    """Where a caller wants something written; ``~`` is their home, as it is for what is read.

    Args:
        name: what messages call it.
        path: as given.

    Raises:
        ValueError: no path, or the home folder of somebody who is not known.
    """
    if not isinstance(path, (str, PathLike)) or not isinstance(text := fspath(path), str):
        raise ValueError(f"{name} must be a path, got {type(path).__name__}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home folder in {text!r:.100} is not known") from error
