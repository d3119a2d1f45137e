"""Safetensors files, read and written one tensor at a time.

Tensors are read into fresh memory rather than mapped: a mapped file that shrinks under us kills the process where a read raises
an error, mapped pages count as the process's own memory, and a mapped tensor may lie at an odd address (int8 products on a CPU
crash on those). The file stays open, so the pristine weights remain reachable even if its name goes away.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError, OutputError

from .safetensors_header import DTYPES, TensorEntry, read_header
from .tensor_source import MemorySource, TensorSource

_LARGEST_READ = 1 << 30
_PICKLE_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


class SafetensorsSource:
    """One safetensors file.

    Args:
        path: of the file.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it cannot be read, is truncated, or is no safetensors file; the message says what it is instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_regular_file(path)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        try:
            status = os.fstat(self._descriptor)
            self._identity = (status.st_size, status.st_mtime_ns)
            with open(self._descriptor, "rb", closefd=False) as stream:
                header = read_header(stream, status.st_size, str(path))
        except OSError as error:
            self.close()
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except CheckpointError:
            self.close()
            raise
        self._entries = header.entries
        self.metadata: Mapping[str, str] = header.metadata

    def keys(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def read(self, key: str) -> Tensor:
        entry = self._entries[key]
        if not self._finalizer.alive:
            raise ValueError(f"{self.path} was closed; nothing can be read from it")
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        try:
            self._fill(tensor, entry)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error.strerror or error}") from error
        return tensor

    def _fill(self, tensor: Tensor, entry: TensorEntry) -> None:
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self._identity:
            raise CheckpointError(f"{self.path}: the file was changed after it was opened; load it again")
        target = _bytes_of(tensor)
        done = 0
        while done < entry.size_bytes:
            count = os.preadv(self._descriptor, [target[done : done + _LARGEST_READ]], entry.offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: truncated: it ends at byte {entry.offset + done}, inside a tensor")
            done += count

    def describe(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._finalizer()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _open_regular_file(path: Path) -> int:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise CheckpointError(f"{path}: expected a safetensors file, but this is {kind}")
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error


def is_pickle_name(path: Path) -> bool:
    """Whether a file's name says that it is a pickle, which is never read."""
    return path.suffix.lower() in _PICKLE_ENDINGS


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor] | TensorSource, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, which appears whole or not at all.

    Args:
        path: of the file; an existing one is replaced at the end.
        tensors: by key; a source is read one tensor at a time.
        metadata: free text to keep with them.

    Raises:
        ValueError: a tensor's type has no name in the format.
        OutputError: the file cannot be written; nothing is left behind.
    """
    source = MemorySource(tensors) if isinstance(tensors, Mapping) else tensors
    names = {dtype: name for name, dtype in DTYPES.items()}
    unknown = sorted({str(source.dtype(key)) for key in source.keys()} - {str(dtype) for dtype in names})  # noqa: SIM118
    if unknown:
        raise ValueError(f"cannot write {', '.join(unknown)}; the format takes {', '.join(map(str, names))}")
    # Wide types first: then every tensor is aligned to its element size without gaps.
    order = sorted(source.keys(), key=lambda key: (-source.dtype(key).itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        begin, end = end, end + torch.Size(source.shape(key)).numel() * source.dtype(key).itemsize
        header[key] = {"dtype": names[source.dtype(key)], "shape": list(source.shape(key)), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with _appearing_whole(path) as descriptor, open(descriptor, "wb", closefd=False) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                stream.write(_bytes_of(source.read(key).contiguous()))
            stream.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _appearing_whole(path: Path) -> Iterator[int]:
    """A new file beside ``path`` that takes its name when the block ends well and vanishes when it does not."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
