"""Quantise each row of a matrix to 8 bits with a float32 scale of its own.

    amax = max(max|x|, 1e-30)      scale = amax / limit      q = round(x * (limit / amax))
    limit: 448 for float8_e4m3fn, 127 for int8

Each element of x is read once and one byte written for it. Source: row-wise dynamic scaling as in FBGEMM's and torchao's
``rowwise`` recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZED_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_AMAX = 1e-30
"""Below this a row counts as this large: its reciprocal stays finite, and a row of zeros stays zeros."""
SCALE_ROWS = 256
"""Row scales lie in buffers of a multiple of this many rows: some row-wise fp8 GEMMs read past the last (pytorch issue 133334)."""


def new_row_scales(rows: int, device: torch.device) -> Tensor:
    """Allocate float32 [rows] scales at the front of a buffer whose rows are a multiple of `SCALE_ROWS`."""
    return torch.empty(-(-rows // SCALE_ROWS) * SCALE_ROWS, dtype=torch.float32, device=device)[:rows]


def quantize_rows_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain PyTorch version of `quantize_rows`, with the same arguments."""
    limit = QUANTIZED_LIMITS[dtype]
    wide = x.float()
    amax = wide.abs().amax(dim=-1).clamp(min=SMALLEST_AMAX)
    scale = new_row_scales(x.shape[0], x.device)
    torch.div(amax, limit, out=scale)
    scaled = (wide * (limit / amax)[:, None]).clamp(-limit, limit)
    if dtype == torch.int8:
        # The integer of a NaN is undefined; its row's scale is NaN and carries it.
        scaled = scaled.round().nan_to_num(0.0)
    return scaled.to(dtype), scale


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise every row with its own scale.

    Args:
        x: [T, C], rows contiguous; float32, bfloat16 or float16.
        dtype: `torch.float8_e4m3fn` or `torch.int8`.

    Returns:
        The values, [T, C] in `dtype`, and the row scales, float32 [T]: values * scale[:, None] is x, rounded. A row of zeros gives
        zeros. A row with a NaN or an infinity gives NaN when it is multiplied out. The scales lie at the front of a buffer padded
        to a multiple of 256 rows.

    Raises:
        ValueError: another dtype, or x is not a matrix of floats.
    """
    if dtype not in QUANTIZED_LIMITS:
        raise ValueError(f"rows can be quantised to {sorted(map(str, QUANTIZED_LIMITS))}, got {dtype}")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"expected a matrix of floats, got {x.dtype} of shape {tuple(x.shape)}")
    return quantize_rows_reference(x, dtype)
