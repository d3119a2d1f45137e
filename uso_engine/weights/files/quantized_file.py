"""The file format of quantised transformers: safetensors whose tensors lie at multiples of 64 bytes and prove their content.

The header's metadata holds one JSON document under `METADATA_KEY`: what the file is made of, and the SHA-256 of every tensor; a
second entry holds the SHA-256 of that document together with every tensor's type, shape and place. So a change of any byte is
found: in the header always, in the tensors when they are read. This detects damage and mix-ups; it is no signature.

Tensors are mapped, not read: pages come from the disk as they are used and are shared between processes. A mapped file must not
be overwritten in place; `write_quantized_file` never does, it replaces whole files by renaming.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError, OutputError
from uso_engine.precision.quantized_linear import TensorLayout

from .key_report import summarise_keys
from .safetensors_header import DTYPES, SafetensorsHeader, read_header

METADATA_KEY = "uso_quantized"
DIGEST_KEY = "uso_quantized_sha256"
ALIGNMENT = 64
PADDING_PREFIX = "padding."
_NO_DIGEST = "0" * 64
_HASHING_THREADS = 4
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Document = dict[str, Any]
"""What the file says about itself, plain JSON."""


def write_quantized_file(
    path: Path, layout: Mapping[str, TensorLayout], tensors: Iterable[tuple[str, Tensor]], document: Mapping[str, object]
) -> None:
    """Write a file while its tensors are being made; it appears whole or not at all.

    Args:
        path: of the file; an existing one is replaced at the end.
        layout: type and shape of every tensor, in the order of the file.
        tensors: each key of `layout` once, in any order; only one is held at a time.
        document: plain JSON about the file.

    Raises:
        OutputError: the file cannot be written, or there is not enough room for it.
        ValueError: a tensor that is not in the layout, has another type or shape, comes twice, or never.
    """
    offsets, table, end = _placed(layout)
    hashes = dict.fromkeys(layout, _NO_DIGEST)
    draft_header = _header(table, {**document, "sha256": hashes})
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _require_room(path.parent, len(draft_header) + end)
        with draft.open("xb") as stream:
            stream.write(draft_header)
            stream.truncate(len(draft_header) + end)
            for key, tensor in tensors:
                _check_tensor(key, tensor, layout, hashes)
                content = _bytes(tensor)
                hashes[key] = hashlib.sha256(content).hexdigest()
                stream.seek(len(draft_header) + offsets[key])
                stream.write(content)
            absent = [key for key, digest in hashes.items() if digest == _NO_DIGEST]
            if absent:
                raise ValueError(f"tensors of the layout that never came: {summarise_keys(absent)}")
            header = _header(table, {**document, "sha256": hashes})
            if len(header) != len(draft_header):
                raise RuntimeError(f"the header has {len(header)} bytes, {len(draft_header)} were left for it")
            stream.seek(0)
            stream.write(header)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


class QuantizedFile:
    """A quantised transformer's file, mapped.

    Args:
        path: of the file.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: truncated, edited, or no file that `write_quantized_file` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                header = read_header(stream, size, str(path))
                # Private and writable, so that torch takes the memory; nothing ever writes to it.
                self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise MissingFileError(f"{path}: there is no such file") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._entries = {key: entry for key, entry in header.entries.items() if not key.startswith(PADDING_PREFIX)}
        self.document = _proven_document(header, path)
        self._hashes: dict[str, str] = self.document.pop("sha256")

    @property
    def layout(self) -> dict[str, TensorLayout]:
        """Type and shape of every tensor."""
        return {key: TensorLayout(entry.shape, entry.dtype) for key, entry in self._entries.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def tensor(self, key: str) -> Tensor:
        """One tensor, a view of the mapped file that keeps the mapping alive."""
        entry = self._entries[key]
        count = torch.Size(entry.shape).numel()
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(self._mapping, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    def check_contents(self) -> None:
        """Read every tensor and compare it with its hash: 1 to 2 GB/s and thread.

        Raises:
            CheckpointError: a tensor was changed; all such are listed.
        """

        def is_sound(key: str) -> bool:
            entry = self._entries[key]
            content = memoryview(self._mapping)[entry.offset : entry.offset + entry.size_bytes]
            return hashlib.sha256(content).hexdigest() == self._hashes[key]

        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            changed = [key for key, sound in zip(self._entries, pool.map(is_sound, self._entries), strict=True) if not sound]
        if changed:
            raise CheckpointError(
                f"{self.path}: damaged or edited: {len(changed)} tensors do not have the content that was written: "
                f"{summarise_keys(changed)}; make the file again with `uso-engine quantize`"
            )


def is_quantized_file(path: Path) -> bool:
    """Whether a path is a file in this format, going by its header alone."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return METADATA_KEY in read_header(stream, path.stat().st_size, str(path)).metadata
    except (CheckpointError, OSError):
        # What is wrong with it, whoever opens it will say.
        return False


def _placed(layout: Mapping[str, TensorLayout]) -> tuple[dict[str, int], dict[str, dict[str, object]], int]:
    """Offset of every tensor, the header's table with paddings (the format allows no gaps), and the end of the data."""
    offsets: dict[str, int] = {}
    table: dict[str, dict[str, object]] = {}
    end = 0
    for key, (shape, dtype) in layout.items():
        gap = -end % ALIGNMENT
        if gap:
            table[f"{PADDING_PREFIX}{len(table)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        offsets[key], begin = end, end
        end += TensorLayout(shape, dtype).size_bytes
        table[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return offsets, table, end


def _digest(document: Mapping[str, object], table: Mapping[str, object]) -> str:
    canonical = json.dumps([document, table], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _header(table: Mapping[str, dict[str, object]], document: Mapping[str, object]) -> bytes:
    document = json.loads(json.dumps(document))
    metadata = {METADATA_KEY: json.dumps(document, separators=(",", ":")), DIGEST_KEY: _digest(document, table)}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _proven_document(header: SafetensorsHeader, path: Path) -> Document:
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path}: not a quantised transformer of this engine: its header has no {METADATA_KEY!r} entry")
    start = min((entry.offset for entry in header.entries.values()), default=0)
    table = {
        key: {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset - start, entry.offset - start + entry.size_bytes],
        }
        for key, entry in header.entries.items()
    }
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or header.metadata.get(DIGEST_KEY) != _digest(document, table):
        raise CheckpointError(f"{path}: its header was edited or damaged; make the file again with `uso-engine quantize`")
    return document


def _check_tensor(key: str, tensor: Tensor, layout: Mapping[str, TensorLayout], hashes: Mapping[str, str]) -> None:
    if key not in layout:
        raise ValueError(f"{key} is not in the layout")
    if hashes[key] != _NO_DIGEST:
        raise ValueError(f"{key} came twice")
    if (tuple(tensor.shape), tensor.dtype) != layout[key]:
        expected = layout[key]
        raise ValueError(f"{key} must be {expected.dtype} {list(expected.shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _require_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise OutputError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
