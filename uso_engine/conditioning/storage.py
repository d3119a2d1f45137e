"""Prompt embeddings and style tokens as safetensors files, to be computed once and passed in later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from uso_engine.errors import CheckpointError
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors

_FORMAT = "uso-engine 1"


def save_conditioning(path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and what they were made from; a failure leaves no half-written file.

    Args:
        path: the file to write; one already there is replaced at the end.
        kind: what is in it, checked when it is read.
        tensors: by name, on any device.
        metadata: strings kept beside them.

    Raises:
        OutputError: the file cannot be written.
    """
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    write_safetensors(path, stored, {**metadata, "format": _FORMAT, "kind": kind})


def load_conditioning(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read what ``save_conditioning`` wrote.

    Args:
        path: the file.
        kind: what it has to hold.
        names: tensors it has to hold.

    Returns:
        The tensors on the CPU by name, and the metadata.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a safetensors file, something else in it, or values that are not finite.
    """
    source = SafetensorsSource(path)
    try:
        metadata = source.metadata
        if metadata.get("format") != _FORMAT or metadata.get("kind") != kind:
            found = f"{metadata.get('kind', 'something else')!r} in format {metadata.get('format', 'unknown')!r}"
            raise CheckpointError(f"{path} does not hold {kind!r} in format {_FORMAT!r} but {found}")
        absent = [name for name in names if name not in source.keys()]  # noqa: SIM118
        if absent:
            raise CheckpointError(f"{path} cannot be used: missing {', '.join(absent)}")
        tensors = {name: source.read(name) for name in names}
    finally:
        source.close()
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path} cannot be used: not finite: {', '.join(broken)}")
    return tensors, metadata
