"""Weights that are stored in 8 bits with scales beside them, multiplied when they are read.

- ComfyUI's scaled fp8, older: ``L.scale_weight`` beside ``L.weight``, and a key ``scaled_fp8`` that says so;
- newer: ``L.weight_scale``, and ``L.comfy_quant``, a JSON text in bytes that names the format;
- optimum-quanto's int8: ``L.weight._data`` and ``L.weight._scale`` in place of ``L.weight``.

A scale is one number for the tensor or one for every row. Scales of activations are left: the engine finds its own.
Source: key names in ComfyUI's comfy/ops.py and comfy/quant_ops.py, and of optimum-quanto's WeightQBytesTensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uso_engine.errors import CheckpointError

from .key_report import bulleted, short_key, summarise_keys
from .tensor_source import TensorSource

_SCALE = re.compile(r"(?P<layer>.*)\.(?:scale_weight|weight_scale)")
_QUANTO = re.compile(r"(?P<weight>.*\.weight)\._(?P<part>data|scale)")
_BOOKKEEPING = re.compile(r"(?:.*\.)?(?:scaled_fp8|comfy_quant|scale_input|input_scale|output_scale)")
# Tables, not matrices: scales belong to what is multiplied.
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "embedding.weight", "relative_attention_bias.weight")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_FORMAT_BYTES = 10_000


@dataclass(frozen=True)
class _Scaled:
    """The stored keys of one weight."""

    values: str
    scale: str


def with_scales(source: TensorSource) -> TensorSource:
    """View a checkpoint's scaled weights as plain ones.

    Args:
        source: any checkpoint; its scales are read at once, its weights when they are asked for.

    Returns:
        The source itself if it has no scales.

    Raises:
        CheckpointError: a scale without its weight, an 8-bit weight without its scale, a scale of another shape or one that is
            not a positive number, or values of another format; every key at fault is in the message.
    """
    keys = source.keys()
    held = set(keys)
    scaled: dict[str, _Scaled] = {}
    problems: dict[str, list[str]] = {}
    for key in keys:
        if match := _SCALE.fullmatch(key):
            weight = f"{match['layer']}.weight"
            if weight not in held:
                problems.setdefault(f"a scale without {match['layer']}.weight", []).append(key)
            scaled[weight] = _Scaled(weight, key)
        elif match := _QUANTO.fullmatch(key):
            pair = _Scaled(f"{match['weight']}._data", f"{match['weight']}._scale")
            for other in {pair.values, pair.scale} - held:
                problems.setdefault(f"{other} is missing beside", []).append(key)
            scaled[match["weight"]] = pair
    bookkeeping = [key for key in keys if _BOOKKEEPING.fullmatch(key)]
    if not scaled and not bookkeeping:
        return source
    if not problems:
        _check(source, scaled, bookkeeping, problems)
    if problems:
        lines = [f"{problem}: {summarise_keys(found)}" for problem, found in problems.items()]
        raise CheckpointError(bulleted(f"{source.describe()}: weights in 8 bits that cannot be read", lines))
    hidden = {key for pair in scaled.values() for key in (pair.values, pair.scale)} | set(bookkeeping)
    return _ScaledSource(source, scaled, [key for key in keys if key not in hidden])


def _check(source: TensorSource, scaled: Mapping[str, _Scaled], bookkeeping: list[str], problems: dict[str, list[str]]) -> None:
    def add(problem: str, key: str) -> None:
        problems.setdefault(problem, []).append(key)

    for weight, pair in scaled.items():
        shape, dtype = source.shape(pair.scale), source.dtype(pair.values)
        rows = source.shape(pair.values)[0] if source.shape(pair.values) else 1
        # ComfyUI multiplies whatever has a scale; quanto keeps 8-bit values under this name.
        is_quanto = pair.values != weight
        if dtype not in (*_FP8, torch.int8) if is_quanto else not dtype.is_floating_point:
            add(f"{dtype} with a scale, expected {'int8' if is_quanto else 'float8'}", pair.values)
        if not source.dtype(pair.scale).is_floating_point:
            add(f"{source.dtype(pair.scale)}, expected floating-point scales", pair.scale)
        elif math.prod(shape) != 1 and shape not in ((rows,), (rows, 1)):
            add(f"shape {list(shape)}, expected one scale, or [{rows}] or [{rows}, 1]", pair.scale)
        elif not _is_positive(source.read(pair.scale)):
            add("scales that are not positive numbers", pair.scale)
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        is_matrix = key.endswith(".weight") and len(source.shape(key)) == 2 and not key.endswith(_EMBEDDINGS)
        if source.dtype(key) in _FP8 and is_matrix and key not in scaled:
            add("in fp8 without a scale, though others have one", key)
    for key in bookkeeping:
        if key.endswith("comfy_quant"):
            stored = _stored_format(source, key)
            if stored not in _FORMATS:
                add(f"stored as {stored}, expected {' or '.join(_FORMATS)}; use a file in one of these, bfloat16 or GGUF", key)


def _is_positive(scale: Tensor) -> bool:
    values = scale.double()
    return bool((torch.isfinite(values) & (values > 0)).all())


def _stored_format(source: TensorSource, key: str) -> str:
    if math.prod(source.shape(key)) > _MAX_FORMAT_BYTES or source.dtype(key) != torch.uint8:
        return "something that is no JSON text"
    try:
        content = json.loads(bytes(source.read(key).flatten().tolist()))
    except (ValueError, RecursionError):
        return "something that is no JSON text"
    return short_key(str(content.get("format"))) if isinstance(content, dict) else "something that is no JSON object"


class _ScaledSource:
    """A source whose scaled weights are multiplied in float32 as they are read; one weight is held at a time."""

    def __init__(self, base: TensorSource, scaled: Mapping[str, _Scaled], plain: list[str]) -> None:
        self._base = base
        self._scaled = dict(scaled)
        self._keys = (*plain, *scaled)

    def keys(self) -> tuple[str, ...]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return self._base.shape(self._stored(key))

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key in self._scaled else self._base.dtype(key)

    def read(self, key: str) -> Tensor:
        if key not in self._scaled:
            return self._base.read(key)
        pair = self._scaled[key]
        weight = self._base.read(pair.values).to(torch.float32)
        scale = self._base.read(pair.scale).to(torch.float32).flatten()
        return weight.mul_(scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (weight.ndim - 1)))

    def describe(self) -> str:
        return self._base.describe()

    def close(self) -> None:
        self._base.close()

    def _stored(self, key: str) -> str:
        return self._scaled[key].values if key in self._scaled else key
