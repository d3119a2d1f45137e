"""The LoRAs that a caller or a shell names: what is accepted, and where relative paths start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias
from weakref import WeakValueDictionary

from uso_engine.config import EMBEDDED_PREFIX, EngineConfig
from uso_engine.weights.files.paths import resolve_path
from uso_engine.weights.lora import LoRA, read_lora

from .transformer import resolve

LoRAChoice: TypeAlias = str | Path | tuple[str | Path, float]
"""A path or hub id, alone for weight 1 or with its weight."""

_EXPECTED = 'loras must be a list of paths or of (path, weight), such as ["a.safetensors", ("b.safetensors", 0.8)]'


@dataclass(frozen=True)
class ChosenLoRAs:
    """LoRAs to be in the weights; two that name the same unchanged files, weights and switch are equal.

    Args:
        key: path, time and size of each file, and its weight.
        keep_configured: whether the configuration's LoRAs, USO's own among them, stay.
        loras: what was read, with its weights.
    """

    key: tuple[tuple[str, int, int, float], ...] = ()
    keep_configured: bool = True
    loras: tuple[tuple[LoRA, float], ...] = field(default=(), compare=False, repr=False)


_chosen: WeakValueDictionary[tuple[object, ...], ChosenLoRAs] = WeakValueDictionary()
"""What is in use somewhere, so that it need not be read again."""


def choose_loras(loras: Iterable[LoRAChoice], config: EngineConfig, *, keep_configured: bool = True) -> ChosenLoRAs:
    """Read the LoRAs that a caller names; those that are in use are not read again.

    Args:
        loras: paths, relative to the working directory, or hub ids; each alone for weight 1 or with its weight.
        config: of the engine whose transformer they are for.
        keep_configured: whether the configuration's stay beside them.

    Raises:
        ValueError: something else than such a list; says what.
        MissingFileError: a file is not there.
        LoRAError: a file that does not fit; see `read_lora`.
    """
    chosen = _found(loras, config)
    key = tuple((str(path), (stat := path.stat()).st_mtime_ns, stat.st_size, weight) for path, weight in chosen)
    identity = key, keep_configured, config.transformer.params
    known = _chosen.get(identity)
    if known is None:
        known = _chosen[identity] = ChosenLoRAs(key, keep_configured, tuple(_read(chosen, config)))
    return known


def _found(loras: Iterable[LoRAChoice], config: EngineConfig) -> list[tuple[Path, float]]:
    # A mapping of paths to weights would give its paths, and lose the weights.
    if isinstance(loras, str | bytes | PathLike | Mapping) or not isinstance(loras, Iterable):
        raise ValueError(f"{_EXPECTED}; got {loras!r:.200}")
    chosen = [_path_and_weight(item) for item in loras]
    # All are found before the first is read.
    return [(_find(path, config), weight) for path, weight in chosen]


def _read(found: Iterable[tuple[Path, float]], config: EngineConfig) -> list[tuple[LoRA, float]]:
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
