"""Sizes of a model as a file gives them: every number of its own type and within what such a model can have.

A configuration or a quantised file may say anything. Sizes are believed before the weights prove them: layers are made, memory
is planned. So each has a bound, far above every published FLUX model and far below what would keep a machine busy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

from uso_engine.model.params import TransformerParams
from uso_engine.weights.autoencoder_keys import AutoencoderParams

Sizes = TypeVar("Sizes", TransformerParams, AutoencoderParams)

MOST_PROBLEMS = 20

_WIDTH, _BLOCKS, _CHANNELS = 65_536, 1_000, 4_096
_BOUNDS: dict[str, tuple[float, float]] = {
    "in_channels": (1, _CHANNELS),
    "vec_in_dim": (1, _WIDTH),
    "context_in_dim": (1, _WIDTH),
    "hidden_size": (1, _WIDTH),
    "mlp_ratio": (0.01, 64),
    "num_heads": (1, 1_024),
    "depth": (1, _BLOCKS),
    "depth_single_blocks": (1, _BLOCKS),
    "axes_dim": (2, 1_024),
    "theta": (2, 1_000_000_000),
    "ch": (1, _CHANNELS),
    "ch_mult": (1, 64),
    "num_res_blocks": (1, 64),
    "z_channels": (1, _CHANNELS),
    "scale_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
    "out_ch": (1, _CHANNELS),
    "resolution": (1, 65_536),
    "norm_groups": (1, _CHANNELS),
}
_MOST_LEVELS = 8


def read_sizes(kind: type[Sizes], table: object) -> Sizes:
    """Make a dataclass of sizes from a table of a file; what the table does not name has its default.

    Args:
        kind: of the model.
        table: sizes by name, or the dataclass itself.

    Raises:
        ValueError: no table, unknown names, values of another type or out of bounds (all are listed), or sizes that contradict
            each other.
    """
    if isinstance(table, kind):
        return table
    if not isinstance(table, Mapping):
        raise ValueError(f"expected a table of sizes, got {type(table).__name__}")
    known = {field.name: field.default for field in fields(kind)}
    problems = [f"unknown key {key!r:.80}{_suggestion(key, list(known))}" for key in table if key not in known]
    values: dict[str, object] = {}
    for name, value in table.items():
        if name not in known:
            continue
        entry = tuple(value) if isinstance(value, list) else value
        problem = _problem(name, entry, known[name])
        if problem is None:
            values[name] = entry
        else:
            problems.append(f"{name}: {problem}, got {shown(value)}")
    if problems:
        raise ValueError("; ".join(problems[:MOST_PROBLEMS]))
    return kind(**values)  # type: ignore[arg-type]


def shown(value: object) -> str:
    """A value for a message: it may be a number of a million digits, or lists within lists."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _suggestion(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _problem(name: str, value: object, default: object) -> str | None:
    """What is wrong with one value; the default shows its type."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "expected true or false"
    low, high = _BOUNDS[name]
    if not isinstance(default, tuple):
        return None if _is_number(value, low, high, whole=isinstance(default, int)) else _expected(default, low, high)
    least = len(default) if name == "axes_dim" else 1
    if (
        isinstance(value, tuple)
        and least <= len(value) <= _MOST_LEVELS
        and all(_is_number(v, low, high, whole=True) for v in value)
    ):
        return None
    return f"expected a list of {least} to {_MOST_LEVELS} whole numbers from {low:,} to {high:,}"


def _is_number(value: object, low: float, high: float, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) and low <= value <= high if isinstance(value, float) else low <= value <= high


def _expected(default: object, low: float, high: float) -> str:
    return f"expected a {'whole ' if isinstance(default, int) else ''}number from {low:,} to {high:,}"
