"""Where files are kept: a folder, or an object store through fsspec. A file is there whole or not at all."""

from __future__ import annotations

import errno
import logging
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from uso_engine.errors import ConfigError, OutputError
from uso_engine.imaging.atomic import create_atomically, write_atomically

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z]+(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,199})")
_MARK = ".writable"
_ABANDONED_S = 3600.0
"""After so long a file that is still being written belongs to a process that is gone."""


class Storage(Protocol):
    """Files by name, ``folder/name``. Every method may wait for a disk or a network: call it from a thread."""

    def write(self, name: str, data: bytes, content_type: str) -> None:
        """Keep a file; OutputError where that fails, and then nothing of it is there."""

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        """Keep a file if there is none of its name: of all who try, one does.

        An object store has to know conditional writes for it, a folder hard links; others let two do it that try in the same
        moment.

        Returns:
            Whether the file is this one. Where an answer was lost on the way it may be although this says no: read it.

        Raises:
            OutputError: that fails; the file may be there.
        """

    def read(self, name: str) -> bytes:
        """A file; FileNotFoundError where there is none, OutputError where the store fails."""

    def names(self, folder: str) -> list[str]:
        """Names of the files of a folder, without it, sorted."""

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    def signed_url(self, name: str, seconds: float) -> str:
        """A URL under which the store itself gives the file to anybody for so long; ConfigError where it has none."""


def open_storage(url: str) -> Storage:
    """The storage behind a URL.

    Args:
        url: ``file:///folder``, ``file://~/folder`` of the user whose process this is, or ``s3://bucket/prefix``. Credentials,
            region and end point of S3 come from boto's environment variables (``AWS_ACCESS_KEY_ID``,
            ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL`` …).

    Raises:
        ConfigError: another URL, a folder that cannot be written to, or no package for it.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FolderStorage(Path(unquote(parts.path)))
    if parts.scheme == "file" and parts.netloc == "~" and parts.path.strip("/"):
        return FolderStorage(_home(url) / unquote(parts.path).lstrip("/"))
    if parts.scheme == "s3" and parts.netloc:
        return S3Storage(f"{parts.netloc}{parts.path}".rstrip("/"))
    raise ConfigError(f"storage must be file:///folder, file://~/folder or s3://bucket/prefix, got {url!r}")


def _home(url: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:  # A user without an entry, as a container may have, and no HOME.
        raise ConfigError(f"storage {url} is in this user's home, which is not known; set HOME, or name the folder") from None


class FolderStorage:
    """Files in a folder of this machine, or of a network file system that renames atomically.

    Args:
        folder: where to; made if it is not there, for this user alone: pictures, prompts and names that are secrets are in it.

    Raises:
        ConfigError: it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read_clock()
            found = folder.stat()
        except (OSError, OutputError) as error:
            raise ConfigError(f"storage {folder} cannot be written to: {error}") from error
        self._identity = found.st_dev, found.st_ino
        self._remove_abandoned(list(folder.glob(f".{_MARK}.*.part")))
        if found.st_mode & stat.S_IWOTH:
            logger.warning("storage %s can be changed by every user of this machine, pictures and queue too", folder)

    def write(self, name: str, data: bytes, content_type: str) -> None:
        path = self._folder / checked_name(name)
        self._check_there()
        write_atomically(path, data)

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        path = self._folder / checked_name(name)
        self._check_there()
        return create_atomically(path, data)

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / checked_name(name)).read_bytes()
        except FileNotFoundError:
            self._check_there()
            raise
        except OSError as error:
            raise OutputError(f"cannot read {name}: {error.strerror}") from error

    def names(self, folder: str) -> list[str]:
        try:
            entries = sorted((self._folder / folder).iterdir())
        except FileNotFoundError:
            self._check_there()
            return []
        except OSError as error:
            raise OutputError(f"cannot list {folder}: {error.strerror}") from error
        self._remove_abandoned([entry for entry in entries if entry.name.startswith(".")])
        return [entry.name for entry in entries if not entry.name.startswith(".")]

    def delete(self, name: str) -> None:
        try:
            (self._folder / checked_name(name)).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot remove {name}: {error.strerror}") from error

    def signed_url(self, name: str, seconds: float) -> str:
        raise ConfigError("a folder has no URLs of its own; signed URLs need storage in s3://")

    def _check_there(self) -> None:
        """A folder that was unmounted would hide what is written into it, and say of everything that it never was."""
        try:
            found = self._folder.stat()
            # Mounted anew it may have another device, but has the mark; whoever tidies old files up may have taken that.
            if (found.st_dev, found.st_ino) == self._identity or (self._folder / _MARK).exists():
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OutputError(f"the storage {self._folder} cannot be used: {error.strerror}") from error
        raise OutputError(f"the storage {self._folder} was removed, or is another one than when this server started")

    def _remove_abandoned(self, parts: list[Path]) -> None:
        """What a process that was killed while it wrote has left; no name ever led to it."""
        if not any(self._seems_abandoned(part) for part in parts):
            return
        try:
            self._check_there()
            self._read_clock()  # Anew: set back since, it would make what is being written seem old.
        except (OSError, OutputError) as error:
            logger.warning("storage %s: abandoned files stay: %s", self._folder, error)
            return
        for part in parts:
            try:
                if self._seems_abandoned(part):
                    part.unlink()
            except FileNotFoundError:
                continue  # Its writer was alive after all, or another sweep was faster.
            except OSError as error:
                logger.warning("an abandoned file in %s cannot be removed: %s", part.parent, error.strerror)

    def _read_clock(self) -> None:
        """The file system's clock, which may be another machine's, beside this one's watch."""
        write_atomically(self._folder / _MARK, b"")
        self._written = (self._folder / _MARK).stat().st_mtime, time.monotonic()

    def _seems_abandoned(self, part: Path) -> bool:
        now = self._written[0] + time.monotonic() - self._written[1]
        try:
            return now - part.stat().st_mtime > _ABANDONED_S
        except OSError:
            return False


class S3Storage:
    """Objects of an S3-compatible store; a put is atomic there.

    Args:
        root: bucket and prefix.

    Raises:
        ConfigError: no bucket, no access to it, or s3fs is not installed.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._files = _s3_files()
        try:
            self._files.pipe_file(f"{root}/{_MARK}", b"")
        except Exception as error:
            raise ConfigError(f"storage s3://{root} cannot be written to: {error}") from error

    def write(self, name: str, data: bytes, content_type: str) -> None:
        path = self._path(name)
        try:
            self._files.pipe_file(path, data, ContentType=content_type)
        except Exception as error:
            raise OutputError(f"cannot store {name}: {type(error).__name__}: {error}") from error

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        path = self._path(name)
        if self._is_there(name):  # Some stores pass over a condition that they do not know, and would write over it.
            return False
        try:
            self._files.pipe_file(path, data, mode="create", ContentType=content_type)
        except Exception as error:
            # Stores say in words of their own that a condition is not met, and some know no conditions at all.
            if isinstance(error, FileExistsError) or self._is_there(name):
                return False
            if not isinstance(error, OSError) or error.errno != errno.ENOSYS:
                raise OutputError(f"cannot store {name}: {type(error).__name__}: {error}") from error
            self.write(name, data, content_type)
        return True

    def _is_there(self, name: str) -> bool:
        try:
            self.read(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        path = self._path(name)
        try:
            return bytes(self._files.cat_file(path))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OutputError(f"cannot read {name}: {type(error).__name__}: {error}") from error

    def names(self, folder: str) -> list[str]:
        try:
            # Not the cached listing: other replicas write, too.
            found = self._files.ls(f"{self._root}/{folder}", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise OutputError(f"cannot list {folder}: {type(error).__name__}: {error}") from error
        return sorted(name for path in found if (name := str(path).rpartition("/")[2]))

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise OutputError(f"cannot remove {name}: {type(error).__name__}: {error}") from error

    def signed_url(self, name: str, seconds: float) -> str:
        path = self._path(name)
        try:
            return str(self._files.sign(path, expiration=max(1, int(seconds))))
        except Exception as error:
            raise OutputError(f"cannot sign {name}: {type(error).__name__}: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}"


def checked_name(name: str) -> str:
    """A name of the form folder/name, without anything that leads elsewhere; ValueError for others."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name in the storage; expected folder/name of letters, digits, '.', '_', '-'")
    return name


def _s3_files() -> AbstractFileSystem:
    try:
        import s3fs
    except ImportError as error:
        raise ConfigError(f"storage in s3:// needs the package s3fs (pip install 'uso-engine[s3]'): {error}") from error
    bounds = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 3}}
    # Listings change under us, and an instance of another thread's event loop must not be handed back.
    return s3fs.S3FileSystem(config_kwargs=bounds, use_listings_cache=False, skip_instance_cache=True)
