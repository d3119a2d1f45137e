"""The header of a safetensors file, checked against the file: names, types, shapes and byte ranges of its tensors.

Layout: the header's length in 8 bytes little-endian; the header, a JSON object from tensor name to type, shape and byte range;
the tensors' bytes. Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import torch

from uso_engine.errors import CheckpointError

from .key_report import short_key, summarise_keys

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types that this engine reads and writes."""

MAX_HEADER_BYTES = 25_000_000
"""FLUX.1-dev's header has about 0.1 MB; a trainer's notes in the metadata make some LoRA headers a few MB."""

_PICKLE = "a Python pickle (.pt, .ckpt, .bin); only safetensors is read, because a pickle can run code: convert it"

_DISGUISES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`, or download the file again"),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"PK\x03\x04", "a zip archive, probably a PyTorch pickle (.pt, .ckpt, .bin); only safetensors is read: convert it"),
    (b"GGUF", "a GGUF file, which is not read here"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"\x89HDF", "an HDF5 file; only safetensors is read"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file: its type, shape, and where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The tensors of one file by name, and the free text that came with them."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(stream: BinaryIO, file_bytes: int, name: str) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Args:
        stream: the file, at its beginning.
        file_bytes: its size.
        name: what messages call it.

    Raises:
        CheckpointError: it is empty, cut short, another format under this name, or contradicts itself.
    """
    head = stream.read(4096)
    if not head:
        raise CheckpointError(f"{name}: the file is empty (0 bytes); expected a safetensors file")
    disguise = _disguise(head)
    if disguise:
        raise CheckpointError(f"{name}: expected a safetensors file, but this is {disguise}")
    if len(head) < 8:
        raise CheckpointError(f"{name}: expected a safetensors file, but there are only {file_bytes} bytes")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name}: not a safetensors file: its header would have {length} bytes, and at most {MAX_HEADER_BYTES} are accepted"
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{name}: truncated, or not safetensors: the header should end at byte {8 + length}, the file has {file_bytes}"
        )
    text = head[8 : 8 + length]
    text += stream.read(length - len(text)) if length > len(text) else b""
    return _checked(_parsed(text, name), 8 + length, file_bytes, name)


def _disguise(head: bytes) -> str | None:
    """What a file really is, if its first bytes say so and cannot be the length of a header."""
    if len(head) >= 8 and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return None
    for magic, meaning in _DISGUISES:
        if head.startswith(magic):
            return meaning
    try:
        text = head[:200].decode("utf-8-sig", errors="strict" if len(head) <= 200 else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if text[:1] == "<":
        return "a web page (HTML or XML), probably the error or login page of a failed download; download it again"
    printable = sum((c.isprintable() and c.isascii()) or c in "\r\n\t" for c in text)
    if printable < 0.9 * len(text) or not text:
        return None
    # What it says is not quoted: the path may be a slip, and a message goes further than the file was meant to.
    return "text, perhaps the error message of a failed download; download it again, or correct the path"


def _parsed(text: bytes, name: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise CheckpointError(f"{name}: the header names a key twice: {summarise_keys(twice)}")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not a safetensors file: its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{name}: not a safetensors file: its header is a JSON {type(header).__name__}, not an object")
    return header


def _checked(header: dict[str, object], data_start: int, file_bytes: int, name: str) -> SafetensorsHeader:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{name}: the header's __metadata__ is not an object of strings")
    entries = {key: _entry(key, value, data_start, name) for key, value in header.items()}
    end = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{name}: the header contradicts itself: {short_key(key)} should begin at byte {end}, it says {entry.offset}"
            )
        end += entry.size_bytes
    if end > file_bytes:
        missing = end - file_bytes
        raise CheckpointError(f"{name}: truncated: expected {end} bytes, the file has {file_bytes} ({missing} are missing)")
    if end < file_bytes:
        raise CheckpointError(f"{name}: damaged: the tensors end at byte {end}, but the file has {file_bytes} bytes")
    return SafetensorsHeader(entries, dict(metadata))


def _entry(key: str, value: object, data_start: int, name: str) -> TensorEntry:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{name}: the header's entry for {short_key(key)} is not valid: {reason}")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise refuse("expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"type {short_key(str(dtype))} is not one of {', '.join(DTYPES)}")
    if not _whole_numbers(shape):
        raise refuse("the shape is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise refuse("data_offsets is not a pair of increasing whole numbers")
    size_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size_bytes:
        raise refuse(f"{dtype} of shape {shape} takes {size_bytes} bytes, but data_offsets gives {offsets[1] - offsets[0]}")
    return TensorEntry(DTYPES[dtype], tuple(shape), data_start + offsets[0], size_bytes)


def _whole_numbers(value: object) -> bool:
    # A tensor of more than 2^48 elements or 64 axes does not exist; such numbers only make the products below slow.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value)
    )
