"""API keys: from a file that is read again when it changes, or the environment; kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from uso_engine.errors import ConfigError

logger = logging.getLogger(__name__)

ANONYMOUS = "anonymous"
SHORTEST_KEY = 16
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[!-~]{{{SHORTEST_KEY},512}}")
_CHECK_EVERY_S = 1.0


@dataclass(frozen=True)
class Key:
    """A caller that is known.

    Args:
        name: for logs and limits; not secret.
        digest: SHA-256 of the key.
        requests_per_minute: its own limit; None takes the server's.
        concurrent: its own limit of requests at once; None takes the server's.
    """

    name: str
    digest: bytes
    requests_per_minute: float | None = None
    concurrent: int | None = None


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and the line of a key file that knows it by its hash.

    Raises:
        ConfigError: a name that is not plain.
    """
    key = f"uso-{secrets.token_urlsafe(32)}"
    line = f"{name}:sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    parse_key(line, "the name")
    return key, line


def parse_key(line: str, place: str) -> Key:
    """One line: ``name:key`` or ``name:sha256:HASH``, then ``requests_per_minute=N`` and ``concurrent=N`` where they differ.

    Raises:
        ConfigError: something else; names the place and never the key.
    """
    secret, *settings = line.split()
    name, colon, text = secret.partition(":")
    if not colon or not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: expected name:key with a name of letters, digits, '.', '_' and '-', got no such name")
    hashed = _HASH.fullmatch(text)
    if text.startswith("sha256:") and hashed is None:
        raise ConfigError(f"{place}: expected sha256: and 64 hexadecimal digits for {name}, got {len(text) - 7} characters")
    if hashed is None and not _KEY.fullmatch(text):
        raise ConfigError(
            f"{place}: the key of {name} must have {SHORTEST_KEY} to 512 printable ASCII characters, got {len(text)}"
        )
    digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(text.encode()).digest()
    limits: dict[str, float] = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        if field not in ("requests_per_minute", "concurrent") or not re.fullmatch(r"[1-9]\d{0,6}", value):
            raise ConfigError(f"{place}: expected requests_per_minute=N or concurrent=N after the key of {name}, got {field!r}")
        limits[field] = int(value)
    concurrent = limits.get("concurrent")
    return Key(name, digest, limits.get("requests_per_minute"), None if concurrent is None else int(concurrent))


def parse_keys(lines: Iterable[tuple[str, str]], source: str) -> tuple[Key, ...]:
    """The keys of several places; empty lines and lines that start with # are passed over.

    Args:
        lines: what each line is called, and the line.
        source: what all of it is called.

    Raises:
        ConfigError: a line that is no key, a name or a key given twice, or none at all.
    """
    keys = [
        parse_key(line, place) for place, line in ((place, line.strip()) for place, line in lines) if line and line[0] != "#"
    ]
    pairs: list[tuple[str, list[object]]] = [("name", [key.name for key in keys]), ("key", [key.digest for key in keys])]
    for what, values in pairs:
        if len(set(values)) < len(values):
            twice = next(key.name for key, value in zip(keys, values, strict=True) if values.count(value) > 1)
            raise ConfigError(f"{source}: expected every {what} once, got that of {twice} more than once")
    if not keys:
        raise ConfigError(f"{source}: expected at least one line name:key, got none")
    return tuple(keys)


class KeyRing:
    """The keys that open the server.

    Args:
        file: lines of keys, read again when it changes; one that cannot be read leaves the keys as they were.
        environment: further keys, separated by commas.
        clock: seconds that only grow.

    Raises:
        ConfigError: no keys, or some that cannot be used.
    """

    def __init__(self, file: Path | None, environment: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        lines = [(f"USO_API_KEYS, entry {i}", text) for i, text in enumerate((environment or "").split(","), 1)]
        self._fixed = parse_keys(lines, "USO_API_KEYS") if environment else ()
        self._stamp = _stamp(file) if file is not None else None
        self._keys = self._read()
        self._checked = clock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all keys."""
        return tuple(key.name for key in self._keys)

    def identify(self, presented: str) -> Key | None:
        """Whose key it is, or None. Takes the same time whichever key it is, and whether it is one."""
        self._renew()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _renew(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked < _CHECK_EVERY_S:
            return
        self._checked = now
        try:
            stamp = _stamp(self._file)
            if stamp != self._stamp:
                self._keys = self._read()
                self._stamp = stamp
                logger.info("keys were read again: %s", ", ".join(self.names))
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)

    def _read(self) -> tuple[Key, ...]:
        if self._file is None:
            return self._fixed
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._file}: cannot be read as a file of keys: {error}") from error
        lines = [(f"{self._file}, line {i}", line) for i, line in enumerate(text.splitlines(), 1)]
        named = [(f"USO_API_KEYS, {key.name}", key) for key in self._fixed]
        keys = parse_keys(lines, str(self._file))
        clash = {key.name for key in keys} & {key.name for _, key in named}
        if clash:
            raise ConfigError(f"{self._file}: {', '.join(sorted(clash))} are keys of USO_API_KEYS as well")
        return (*self._fixed, *keys)


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read as a file of keys: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino
