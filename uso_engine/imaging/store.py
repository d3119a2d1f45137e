"""Where finished pictures go so that a URL can point at them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from uso_engine.imaging.atomic import write_atomically

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class ImageStore(Protocol):
    """Takes the bytes of a file and gives a URL for them."""

    def put(self, name: str, data: bytes, content_type: str) -> str:
        """Keep a file.

        Args:
            name: a plain file name, unique and, where strangers can ask for files, unguessable.
            data: the file.
            content_type: its media type.

        Returns:
            A URL under which it can be read.

        Raises:
            OutputError: it could not be kept.
        """


class FileStore:
    """Keeps files in one folder.

    Args:
        folder: where to; made with the first file.
        base_url: what the folder is called from outside, e.g. ``https://host/files``; by default ``file://`` URLs are given.

    Raises:
        ValueError: no path, or a base URL that is no text.
    """

    def __init__(self, folder: str | Path, base_url: str | None = None) -> None:
        if not isinstance(folder, (str, Path)):
            raise ValueError(f"folder must be a path, got {type(folder).__name__}")
        if not isinstance(base_url, (str, type(None))):
            raise ValueError(f"base_url must be a URL as text, got {type(base_url).__name__}")
        self._folder = Path(folder).absolute()
        self._base_url = (self._folder.as_uri() if base_url is None else base_url).rstrip("/")

    def put(self, name: str, data: bytes, content_type: str) -> str:
        """Write the file, whole or not at all.

        Args:
            name: letters, digits, ``.``, ``_`` and ``-``, not starting with a dot.
            data: the file.
            content_type: not needed here; the name's ending says it.

        Returns:
            Its URL.

        Raises:
            ValueError: a name that is not plain.
            OutputError: it cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a plain file name; expected letters, digits, '.', '_', '-'")
        write_atomically(self._folder / name, data)
        return f"{self._base_url}/{name}"
