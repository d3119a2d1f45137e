"""Prompt embeddings and style tokens as safetensors files, to be computed once and passed in later."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError, OutputError

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
    content = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={**metadata, "format": _FORMAT, "kind": kind},
    )
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {kind} to {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {kind} to {path}: {error.strerror}") from error
        raise


def load_conditioning(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
    if not path.is_file():
        raise MissingFileError(f"{kind} not found: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT or metadata.get("kind") != kind:
        found = f"{metadata.get('kind', 'something else')!r} in format {metadata.get('format', 'unknown')!r}"
        raise CheckpointError(f"{path} does not hold {kind!r} in format {_FORMAT!r} but {found}")
    problems = [f"{name} is missing" for name in names if name not in tensors]
    problems += [f"{name} is not finite" for name in names if name in tensors and not torch.isfinite(tensors[name]).all()]
    if problems:
        raise CheckpointError(f"{path} cannot be used: {'; '.join(problems)}")
    return tensors, metadata
