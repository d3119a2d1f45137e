"""Finished images under unguessable names that say until when they are kept, and the sweep that removes them then."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from uso_engine.errors import OutputError

from .storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "files"
# 1. until when, seconds since 1970 in hexadecimal; 2. 128 random bits; 3. the format.
FILE_NAME = r"([0-9a-f]{8,12})-([0-9a-f]{32})\.(png|jpeg)"
_NAME = re.compile(FILE_NAME)
_TYPES = {"png": "image/png", "jpeg": "image/jpeg"}


@dataclass(frozen=True)
class StoredFile:
    """A file that was found.

    Args:
        data: the file.
        content_type: its media type.
        seconds_left: until it is removed.
    """

    data: bytes
    content_type: str
    seconds_left: float


class ImageFiles:
    """Images in a storage.

    Args:
        storage: where they are.
        expiry_s: seconds that an image is kept.
        signed_urls: whether URLs lead to the store itself.
        clock: seconds since 1970.

    Raises:
        ConfigError: signed URLs of a storage that has none.
    """

    def __init__(
        self, storage: Storage, expiry_s: float, *, signed_urls: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._storage, self._expiry_s, self._signed, self._clock = storage, expiry_s, signed_urls, clock
        if signed_urls:
            storage.signed_url(f"{FOLDER}/probe", 1)

    def name_of(self, name: str) -> str:
        """The name under which an image that is stored now is kept.

        Args:
            name: 32 random hexadecimal digits and the format, as `GenerationResult.to_response` makes them.
        """
        stored = f"{int(self._clock() + self._expiry_s):x}-{name}"
        if not _NAME.fullmatch(stored):
            raise ValueError(f"expected 32 hexadecimal digits and .png or .jpeg, got {name!r}")
        return stored

    def keep(self, stored: str, data: bytes, content_type: str, base_url: str) -> str:
        """Store an image.

        Args:
            stored: from `name_of`.
            data: the file.
            content_type: its media type.
            base_url: of this server.

        Returns:
            Its URL.

        Raises:
            OutputError: it cannot be stored.
        """
        self._storage.write(f"{FOLDER}/{stored}", data, content_type)
        if self._signed:
            return self._storage.signed_url(f"{FOLDER}/{stored}", self._expiry_s)
        return f"{base_url}/{FOLDER}/{stored}"

    def find(self, name: str) -> StoredFile | None:
        """An image by its name; None where there is none, or none any more."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        left = int(match[1], 16) - self._clock()
        if left <= 0:
            return None
        try:
            data = self._storage.read(f"{FOLDER}/{name}")
        except FileNotFoundError:
            return None
        return StoredFile(data, _TYPES[match[3]], left)

    def remove(self, stored: str) -> None:
        """Remove an image; one that is not there is no error.

        Raises:
            OutputError: the storage failed.
        """
        self._storage.delete(f"{FOLDER}/{stored}")

    def sweep(self) -> int:
        """Remove what has expired; how many."""
        names = [name for name in self._storage.names(FOLDER) if (match := _NAME.fullmatch(name)) and self._is_over(match)]
        for name in names:
            self.remove(name)
        return len(names)

    def _is_over(self, match: re.Match[str]) -> bool:
        return int(match[1], 16) <= self._clock()


@dataclass(frozen=True)
class RequestStore:
    """The image store of one request: its URLs start at the address that the request came to.

    Args:
        files: where images are kept.
        base_url: of this server, as the client reaches it.
        kept: names of images that were stored, or that may have been.
    """

    files: ImageFiles
    base_url: str
    kept: list[str] = field(default_factory=list)

    def put(self, name: str, data: bytes, content_type: str) -> str:
        """Keep an image; its URL."""
        stored = self.files.name_of(name)
        # Before it is written: of a write that fails the storage may have kept something all the same.
        self.kept.append(stored)
        return self.files.keep(stored, data, content_type, self.base_url)

    def discard(self) -> None:
        """Remove every image of this request, of which nobody was told; what cannot be removed is left to expire."""
        for stored in self.kept:
            try:
                self.files.remove(stored)
            except OutputError as error:
                cause = error.__cause__  # Its message alone has the name, which is in no log.
                reason = (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
                logger.warning("an image that nobody was told of could not be removed and will expire: %s", reason)
