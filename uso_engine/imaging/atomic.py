"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uso_engine.errors import OutputError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_without_links = threading.Lock()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader, crash or Ctrl-C ever sees half of it.

    The bytes go to a hidden file in the same folder, to the disk, and only then to the name; an older file of that name stays
    as it was until that moment.

    Args:
        path: where to; its folder is made if it is not there.
        data: all of it.

    Raises:
        OutputError: it cannot be written; nothing new is left behind.
    """
    with _written_aside(path, data) as part:
        part.replace(path)


def create_atomically(path: Path, data: bytes) -> bool:
    """Write a file if there is none of its name; of several who try at once, on any machine, one does.

    On a file system without hard links that holds for the threads of one process alone.

    Args:
        path: where to; its folder is made if it is not there.
        data: all of it.

    Returns:
        Whether the file is this one. On a network file system that lost an answer it may be, although this says no.

    Raises:
        OutputError: it cannot be written; nothing new is left behind.
    """
    with _written_aside(path, data) as part:
        try:
            created = _linked(part, path)
        finally:
            part.unlink(missing_ok=True)
    return created


def _linked(part: Path, path: Path) -> bool:
    """Give a file a name that no other has; whether it got it."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _without_links:
            if path.exists():
                return False
            part.replace(path)
    return True


@contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    """The bytes in a hidden file beside the name, on the disk; removed where something fails."""
    try:
        part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are readable by their owner alone, whatever the umask says.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield part
        except BaseException:  # Ctrl-C too
            part.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: an empty name, a null byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"cannot write '{path}': {reason}") from error
