"""The LoRAs that a caller or a shell names: what is accepted, and where relative paths start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias

from uso_engine.config import EMBEDDED_PREFIX, EngineConfig
from uso_engine.weights.files.paths import resolve_path
from uso_engine.weights.lora.low_rank import LoRA
from uso_engine.weights.lora.reading import read_lora

from .transformer import resolve

LoRAChoice: TypeAlias = str | Path | tuple[str | Path, float]
"""A path or hub id, alone for weight 1 or with its weight."""

_EXPECTED = 'loras must be a list of paths or of (path, weight), such as ["a.safetensors", ("b.safetensors", 0.8)]'


def read_chosen_loras(loras: Iterable[LoRAChoice], config: EngineConfig) -> list[tuple[LoRA, float]]:
    """Read the LoRAs that a caller names.

    Args:
        loras: paths, relative to the working directory, or hub ids; each alone for weight 1 or with its weight.
        config: of the engine whose transformer they are for.

    Raises:
        ValueError: something else than such a list; says what.
        MissingFileError: a file is not there.
        LoRAError: a file that does not fit; see `read_lora`.
    """
    # A mapping of paths to weights would give its paths, and lose the weights.
    if isinstance(loras, str | bytes | PathLike | Mapping) or not isinstance(loras, Iterable):
        raise ValueError(f"{_EXPECTED}; got {loras!r:.200}")
    chosen = [_path_and_weight(item) for item in loras]
    # All are found before the first is read.
    found = [(_find(path, config), weight) for path, weight in chosen]
    return [(read_lora(file, config.transformer.params), weight) for file, weight in found]


def _path_and_weight(item: object) -> tuple[str | Path, float]:
    path, weight = item if isinstance(item, tuple | list) and len(item) == 2 else (item, 1.0)
    if not isinstance(path, str | PathLike) or isinstance(fspath(path), bytes):
        raise ValueError(f"{_EXPECTED}; one of them is {item!r:.200}")
    try:
        strength = float(weight) if isinstance(weight, Real) and not isinstance(weight, bool) else math.nan
    except OverflowError:
        strength = math.inf
    if not math.isfinite(strength):
        raise ValueError(f"the weight of {str(path)!r} must be a finite number, got {type(weight).__name__} {weight!r:.200}")
    return (path if isinstance(path, str) else Path(path)), strength


def _find(path: str | Path, config: EngineConfig) -> Path:
    if isinstance(path, str) and path.startswith(EMBEDDED_PREFIX):
        return resolve(path, "LoRA", config)
    # A path object is never a hub id; `./` says so.
    text = path if isinstance(path, str) or path.is_absolute() or str(path).startswith("~") else f"./{path}"
    return resolve_path(str(text), what="LoRA", base_dir=Path.cwd(), in_config=False)
