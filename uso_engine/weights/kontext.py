"""Telling FLUX.1-Kontext-dev from FLUX.1-dev: by what a file and its folders are called, for keys and shapes are the same."""

from __future__ import annotations

import re
from pathlib import Path

from uso_engine.errors import CheckpointError
from uso_engine.weights.files.tensor_source import TensorSource

_KONTEXT = re.compile(r"kontext", re.IGNORECASE)
_GENERIC = re.compile(r"transformer|(?:diffusion_pytorch_)?model\b.*")
_TITLES = ("modelspec.title", "modelspec.architecture", "modelspec.description", "general.name", "general.basename")


def refuse_kontext(path: Path, source: TensorSource) -> None:
    """Refuse a checkpoint that says it is FLUX.1-Kontext.

    Args:
        path: where it lies; a name that many checkpoints have, such as ``transformer``, lets its folder speak.
        source: the opened file or files.

    Raises:
        CheckpointError: its name, its repository's or its metadata says so.
    """
    metadata = getattr(source, "metadata", {})
    said = [f"{key} = {metadata[key]}" for key in _TITLES if key in metadata]
    place = path.absolute()
    said += [part for part in place.parts if part.startswith("models--")]
    while _GENERIC.fullmatch(place.name) and place != place.parent:
        place = place.parent
    said.append(place.name)
    found = next((text for text in said if _KONTEXT.search(text)), None)
    if found is not None:
        raise CheckpointError(
            f"{path}: this is FLUX.1-Kontext ({found[:200]}), an editing model for which USO's LoRA was not made; "
            'use FLUX.1-dev, or set base = "kontext" under [transformer] to use it all the same'
        )
