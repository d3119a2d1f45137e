"""optimum-quanto's choice of quantised values; the only module that imports it.

Only its optimizers and its rounding are used. Its tensors and products are not: they crash on values read from a file, compile
extensions at the first use, and turn silently to float32 in a module on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uso_engine.errors import BackendError
from uso_kernels.extension import extension_failure

if TYPE_CHECKING:
    from types import ModuleType

_CHUNK_ELEMENTS = 1 << 23
"""Rows are quantised in pieces of about this many numbers: quanto's temporaries are several times the size of their input."""

_SMALLEST_INT8_SCALE = 1e-30 / 127
_SMALLEST_INT4_SCALE = 2.0**-24
_LARGEST_FLOAT16 = 65504.0


def _quanto() -> ModuleType:
    reason = extension_failure("optimum.quanto")
    if reason is not None:
        raise BackendError(
            f"the int8 and int4 tiers need optimum-quanto: {reason} (pip install 'uso-engine[quant]'); "
            "fp8, bf16 and files that are quantised already work without it"
        )
    import optimum.quanto as quanto

    module: ModuleType = quanto
    return module


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1]))


def int8_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to int8 with quanto's absmax optimizer.

    Args:
        weight: finite float32 [N, K].

    Returns:
        int8 [N, K] and float32 scales [N]: values * scale[:, None] is the weight, rounded.

    Raises:
        BackendError: optimum-quanto is not installed.
    """
    quanto = _quanto()
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    optimizer = quanto.AbsmaxOptimizer()
    start = 0
    for rows in _chunks(weight):
        here = slice(start, start + len(rows))
        # With a single row quanto would change its axis to None and its scale to a scalar; a repeated row keeps both.
        data = rows if len(rows) > 1 else rows.expand(2, -1)
        scale = optimizer(data, quanto.qint8, axis=0).clamp(min=_SMALLEST_INT8_SCALE)
        quantized = quanto.quantize_weight(data, qtype=quanto.qint8, axis=0, scale=scale, activation_qtype=None)
        values[here] = quantized._data[: len(rows)]
        scales[here] = scale[: len(rows)]
        start += len(rows)
    return values, scales.flatten()


def int4_values(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to 4 bits in groups of columns with quanto's max optimizer.

    Args:
        weight: finite float32 [N, K].
        group: columns of a group; K is a multiple of it.

    Returns:
        uint8 codes [N, K] between 0 and 15, float16 scales and shifts [N, K / group]: scale * code - shift is the weight,
        rounded.

    Raises:
        BackendError: optimum-quanto is not installed.
        ValueError: a weight too large for float16 scales.
    """
    quanto = _quanto()
    largest = float(weight.abs().amax())
    if largest > _LARGEST_FLOAT16 / 2:
        raise ValueError(f"int4 stores scales in float16: weights must stay under {_LARGEST_FLOAT16 / 2:g}, got {largest:g}")
    groups = weight.shape[1] // group
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.float16, device=weight.device)
    shifts = torch.empty_like(scales)
    optimizer = quanto.MaxOptimizer()
    start = 0
    for rows in _chunks(weight):
        here = slice(start, start + len(rows))
        grouped = rows.reshape(-1, group)
        if len(grouped) == 1:
            grouped = grouped.expand(2, -1)
        scale, shift = optimizer(grouped, quanto.qint4, axis=0)
        # Codes are chosen for the scales as they will be stored, so that their rounding costs as little as it can.
        scale, shift = scale.clamp(min=_SMALLEST_INT4_SCALE).half(), shift.half()
        code = torch.ops.quanto.quantize_affine(grouped, 4, 0, None, scale.float(), shift.float())
        codes[here] = code[: len(rows) * groups].view(len(rows), -1)
        scales[here] = scale[: len(rows) * groups].view(len(rows), -1)
        shifts[here] = shift[: len(rows) * groups].view(len(rows), -1)
        start += len(rows)
    return codes, scales, shifts
