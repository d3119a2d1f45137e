"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from uso_engine.errors import OutputError


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
            part.replace(path)
        except BaseException:  # Ctrl-C too
            part.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: an empty name, a null byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(f"cannot write '{path}': {reason}") from error
