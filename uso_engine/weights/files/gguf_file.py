"""GGUF files: the format of llama.cpp, in which FLUX and T5 are passed on in 2 to 8 bits per weight.

The `gguf` library reads the header and turns blocks of quantised numbers back into float32; bytes of tensors are read here, one
tensor at a time, like those of safetensors. A header may say anything: what it says is believed as far as the file reaches.
Source: the format's description, ggml/docs/gguf.md; the original shapes kept by ComfyUI-GGUF's converter.
"""

from __future__ import annotations

import math
import os
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uso_engine.errors import BackendError, CheckpointError, MissingFileError

from .key_report import bulleted, short_key, short_reason, summarise_keys

if TYPE_CHECKING:
    from types import ModuleType

MAGIC = b"GGUF"
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
"""What is read; other types exist, mostly for language models."""

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_MOST_READS = 5_000_000
_LARGEST_READ = 1 << 30


def is_gguf(path: Path) -> bool:
    """Whether a file says by its first bytes that it is GGUF; False where there is no such file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class _Entry:
    """One tensor: its type's name, its shape in torch's order, and its bytes in the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class GGUFSource:
    """One GGUF file.

    Args:
        path: of the file.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it cannot be read, is truncated, or its header contradicts itself or names types that are not read.
        BackendError: the gguf library is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _library()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as error:
            raise MissingFileError(f"{path}: there is no such file") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be opened: {error}") from error
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        try:
            status = os.fstat(self._descriptor)
            self._identity = (status.st_size, status.st_mtime_ns)
            self._entries, self.metadata = _read_header(path, self._gguf)
        except BaseException:
            self.close()
            raise

    def keys(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return _STORED.get(self._entries[key].kind, torch.float32)

    def read(self, key: str) -> Tensor:
        entry = self._entries[key]
        if not self._finalizer.alive:
            raise ValueError(f"{self.path} was closed; nothing can be read from it")
        content = torch.empty(entry.size_bytes, dtype=torch.uint8)
        try:
            self._fill(content.numpy().data, entry.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error.strerror or error}") from error
        if entry.kind in _STORED:
            return content.view(_STORED[entry.kind]).reshape(entry.shape)
        blocks = content.numpy().reshape(-1, self._row_bytes(entry))
        values: np.ndarray[Any, np.dtype[np.float32]] = self._gguf.dequantize(
            blocks, self._gguf.GGMLQuantizationType[entry.kind]
        )
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(entry.shape)

    def describe(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._finalizer()

    def _row_bytes(self, entry: _Entry) -> int:
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[entry.kind]]
        whole = entry.shape[-1] if entry.shape and entry.shape[-1] % block == 0 else block
        return int(whole // block * size)

    def _fill(self, target: memoryview, offset: int) -> None:
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self._identity:
            raise CheckpointError(f"{self.path}: the file was changed after it was opened; load it again")
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done : done + _LARGEST_READ]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: truncated: it ends at byte {offset + done}, inside a tensor")
            done += count


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise BackendError(
            "reading GGUF files needs the gguf library, which is not installed (pip install 'uso-engine[gguf]'); "
            "safetensors files work without it"
        ) from error
    module: ModuleType = gguf
    return module


def _read_header(path: Path, gguf: ModuleType) -> tuple[dict[str, _Entry], Mapping[str, str]]:
    class BoundedReader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """The library's reader, which reads past the end of a file without a word, and as often as a file says."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.reads += 1
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data) or self.reads > _MOST_READS:
                raise ValueError(f"it should go on to byte {end}, the file has {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = BoundedReader(path)
        names = {field.name: field for field in reader.fields.values()}
        shapes = {
            name.removeprefix(_ORIGINAL_SHAPE): tuple(int(n) for n in field.contents())
            for name, field in names.items()
            if name.startswith(_ORIGINAL_SHAPE)
        }
        metadata = {
            name: str(field.contents())[:1000]
            for name, field in names.items()
            if field.types and field.types[0] == gguf.GGUFValueType.STRING
        }
        found = [
            (str(one.name), one.tensor_type.name, tuple(reversed(one.shape.tolist())), int(one.data_offset), int(one.n_bytes))
            for one in reader.tensors
        ]
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        reason = short_reason(error)
        raise CheckpointError(f"{path}: truncated or damaged: the GGUF header cannot be read: {reason}") from error
    return _checked(path, found, shapes, gguf), metadata


def _checked(
    path: Path,
    found: list[tuple[str, str, tuple[int, ...], int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    gguf: ModuleType,
) -> dict[str, _Entry]:
    problems: dict[str, list[str]] = {}
    entries: dict[str, _Entry] = {}
    for name, kind, stored, offset, size_bytes in found:
        shape = shapes.get(name, stored)
        if kind not in TYPES:
            problems.setdefault(f"type {short_key(kind)}, which is not read (these are: {', '.join(TYPES)})", []).append(name)
            continue
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        numbers = math.prod(stored)
        if math.prod(shape) != numbers:
            problems.setdefault(f"{numbers} numbers, its original shape {list(shape)} has others", []).append(name)
        if numbers * size != size_bytes * block:
            problems.setdefault(f"{size_bytes} bytes for {numbers} numbers of type {kind}", []).append(name)
        entries[name] = _Entry(kind, shape, offset, size_bytes)
    if problems:
        lines = [f"{problem}: {summarise_keys(keys)}" for problem, keys in problems.items()]
        raise CheckpointError(bulleted(f"{path}: tensors that cannot be read", lines))
    return entries
