"""Rows as one kernel hands them to the next: floats, or 8-bit values with a float32 scale per row.

    amax = max(max|x|, 1e-30)      scale = amax / limit      q = round(x * (limit / amax))
    limit: 448 for float8_e4m3fn, 127 for int8

A kernel that ends in `store_row` and a reference that ends in `write_rows` give either. Source: row-wise dynamic scaling as in
FBGEMM's and torchao's ``rowwise`` recipes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import COMPUTE_CAPABILITIES, Config, Generation, jit, power_of_two, tl

QUANTIZED_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LAUNCH_LIMITS = {**QUANTIZED_LIMITS, torch.float32: 448.0}
"""Also float32, in which the interpreter computes float8 values before PyTorch rounds them (see `uso_kernels.interpret`)."""
SMALLEST_AMAX = 1e-30
"""Below this a row counts as this large: its reciprocal stays finite, and a row of zeros stays zeros."""
SCALE_ROWS = 256
"""Row scales lie in buffers of a multiple of this many rows: fp8 GEMMs may read past the last (pytorch issue 133334)."""
MAX_ROW_WIDTH = 16384
FP8_CAPABILITY = 89
"""The first compute capability for which Triton has float8_e4m3fn."""


def quantized_dtypes(generation: Generation) -> tuple[torch.dtype, ...]:
    """The 8-bit types that Triton has on a generation."""
    has_fp8 = COMPUTE_CAPABILITIES[generation] >= FP8_CAPABILITY
    return (torch.int8, torch.float8_e4m3fn) if has_fp8 else (torch.int8,)


class QuantizedRows(NamedTuple):
    """Values [T, C] in 8 bits and their float32 row scales [T]."""

    values: Tensor
    scale: Tensor


Rows = Tensor | QuantizedRows


def floats(rows: Rows) -> Tensor:
    """The rows as they are, for what multiplies floats.

    Raises:
        TypeError: they are 8-bit ones.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"this layer takes activations as floats, got rows of {rows.values.dtype} with their scales")
    return rows


def new_rows(rows: int, width: int, like: Tensor, dtype: torch.dtype | None) -> Rows:
    """Memory for rows: 8-bit ones of a dtype, or floats of `like`'s where there is none.

    Raises:
        ValueError: a dtype that rows are not quantised to.
    """
    return like.new_empty(rows, width) if dtype is None else new_quantized(rows, width, dtype, like.device)


def new_quantized(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
    """Memory for 8-bit rows.

    Raises:
        ValueError: a dtype that rows are not quantised to.
    """
    if dtype not in QUANTIZED_LIMITS:
        raise ValueError(f"rows can be quantised to {sorted(map(str, QUANTIZED_LIMITS))}, got {dtype}")
    return QuantizedRows(torch.empty(rows, width, dtype=dtype, device=device), new_row_scales(rows, device))


def new_row_scales(rows: int, device: torch.device) -> Tensor:
    """Memory for float32 [rows] scales at the front of a buffer whose rows are a multiple of `SCALE_ROWS`."""
    return torch.empty(-(-rows // SCALE_ROWS) * SCALE_ROWS, dtype=torch.float32, device=device)[:rows]


def parts(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """What an operation fills: values, and row scales where there are any."""
    return (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scale)


def quantize_rows_reference(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Every row with its own scale, in plain PyTorch."""
    limit, wide = QUANTIZED_LIMITS[dtype], x.float()
    amax = wide.abs().amax(dim=-1).clamp(min=SMALLEST_AMAX)
    scale = new_row_scales(len(x), x.device)
    # Tensor by tensor, as the kernel divides. On CUDA a tensor over a number is the tensor times the number's reciprocal, and a
    # number over a tensor is, everywhere, the number times the tensor's: one rounding more.
    limits = torch.full_like(amax, limit)
    torch.div(amax, limits, out=scale)
    scaled = (wide * (limits / amax)[:, None]).clamp(-limit, limit)
    if dtype == torch.int8:
        # The integer of a NaN is undefined; its row's scale is NaN and carries it.
        scaled = scaled.round().nan_to_num(0.0)
    return QuantizedRows(scaled.to(dtype), scale)


def write_rows(wide: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    """How a reference ends: round to `out`'s type, or quantise where there are row scales."""
    if row_scales is None:
        out.copy_(wide)
        return
    values, scale = quantize_rows_reference(wide, out.dtype)
    out.copy_(values)
    row_scales.copy_(scale)


@jit
def row_amax(values):
    """Largest magnitude of float32 values of one row, NaN where any is, at least `SMALLEST_AMAX`."""
    amax = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-30)
    # A plain maximum drops NaN; a broken row must not come out looking sound.
    is_nan = tl.max((values != values).to(tl.int32), axis=0)
    return tl.where(is_nan > 0, float("nan"), amax)


@jit
def quantized(values, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """Float32 values times the row's inverse scale, as 8-bit numbers."""
    scaled = tl.minimum(tl.maximum(values * inverse, -LIMIT), LIMIT)
    if DTYPE.is_int8():
        # Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
        result = tl.where(scaled != scaled, 0.0, (scaled + 12582912.0) - 12582912.0)
    else:
        # Plain maxima turn NaN into a number.
        result = tl.where(inverse != inverse, float("nan"), scaled)
    return result.to(DTYPE)


@jit
def store_row(values, out_ptr, row_scale_ptr, row, stride, columns, mask, LIMIT: tl.constexpr):
    """How a kernel ends: one row of float32 values as they are (LIMIT 0), or quantised with its scale."""
    if LIMIT > 0:
        amax = row_amax(tl.where(mask, values, 0.0))
        tl.store(row_scale_ptr + row, tl.div_rn(amax, LIMIT))
        result = quantized(values, tl.div_rn(LIMIT, amax), LIMIT, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride + columns, result, mask=mask)
    else:
        tl.store(out_ptr + row * stride + columns, values.to(out_ptr.dtype.element_ty), mask=mask)


def store_limit(out: Tensor | None, row_scales: Tensor | None) -> float:
    """`store_row`'s LIMIT."""
    return 0.0 if out is None or row_scales is None else LAUNCH_LIMITS[out.dtype]


ROW_WARPS = {1024: 2, 2048: 4, 4096: 8, 8192: 8, 16384: 16}
"""Warps by the power of two that holds a row, on every generation: 16 to 32 numbers a thread. Reasoned, not yet measured."""


def row_config(width: int) -> Config:
    """Configuration of a kernel that holds one row of `width` numbers in registers, on every generation."""
    block = power_of_two(width)
    return Config(num_warps=ROW_WARPS.get(block, 1), num_stages=1, blocks={"BLOCK_C": block})


def check_row_width(width: int) -> None:
    """Check that a row fits a program's registers.

    Raises:
        ValueError: it does not, or is empty.
    """
    if not 1 <= width <= MAX_ROW_WIDTH:
        raise ValueError(f"rows of 1 to {MAX_ROW_WIDTH} columns are supported, got {width}")
