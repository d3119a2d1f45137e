"""Values as 8-bit floats, with a float32 scale for each sequence, head and channel, for attention in 8 bits.

    amax = max(max|v|, 1e-30) over a sequence's tokens      scale = amax / 448      values = round(v * (448 / amax))

The sum over tokens is the one that attention's second product makes, so a scale of a channel leaves it. A scale is its own
sequence's, whatever else is in the batch. One launch finds the largest magnitudes (two bytes read for each number of v), a
second one writes the values (two bytes read, one written), with the tokens of a channel side by side: the units that multiply
8-bit numbers take them in no other order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, head_strided, jit, tl
from uso_kernels.operation import operation
from uso_kernels.ragged import Ragged
from uso_kernels.rows import SMALLEST_AMAX, quantized

from .quantize_heads import GENERATIONS, HEAD_DIMS, check_head_dim

ELEMENT = torch.float8_e4m3fn


@jit
def _value_amax_kernel(
    v_ptr,  # [T, heads, D]
    v_stride,
    v_head_stride,
    bounds_ptr,  # [S + 1] int32
    lengths_ptr,  # [S] int32
    amax_ptr,  # [S, heads, D] float32, contiguous
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, head, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths_ptr + sequence)
    if tl.program_id(0) * ROWS >= length:
        return
    source_rows = (tl.load(bounds_ptr + sequence) + rows).to(tl.int64)
    columns = tl.arange(0, D)
    source = v_ptr + source_rows[:, None] * v_stride + head * v_head_stride + columns[None, :]
    v = tl.load(source, mask=(rows < length)[:, None], other=0.0).to(tl.float32)
    # The bits of a magnitude are in its order, with infinity and NaN above all: the largest is exact, whoever comes first.
    bits = tl.max(tl.abs(v).to(tl.int32, bitcast=True), axis=0)
    target = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (sequence * heads + head) * D + columns
    tl.atomic_max(target, bits, sem="relaxed")


@jit
def _quantize_values_kernel(
    v_ptr,  # [T, heads, D]
    v_stride,
    v_head_stride,
    amax_ptr,  # [S, heads, D] float32, contiguous
    bounds_ptr,  # [S + 1] int32
    lengths_ptr,  # [S] int32
    values_ptr,  # [heads, D, T], 8 bits, contiguous
    count,  # T
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence, head, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Said, so that a channel's values are written by more than a byte at a time.
    start = tl.multiple_of(tl.load(bounds_ptr + sequence), 16)
    capacity = tl.load(bounds_ptr + sequence + 1) - start
    if tl.program_id(0) * ROWS >= capacity:
        return
    source_rows = (start + rows).to(tl.int64)
    columns = tl.arange(0, D)
    source = v_ptr + source_rows[:, None] * v_stride + head * v_head_stride + columns[None, :]
    v = tl.load(source, mask=(rows < tl.load(lengths_ptr + sequence))[:, None], other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + (sequence * heads + head) * D + columns)
    # Not a maximum, which drops NaN.
    amax = tl.where(amax < 1e-30, 1e-30, amax)
    values = quantized(v, tl.div_rn(448.0, amax)[None, :], 448.0, values_ptr.dtype.element_ty)
    target = values_ptr + (head * D + columns)[:, None] * count + source_rows[None, :]
    tl.store(target, tl.trans(values), mask=(rows < capacity)[None, :])


CONFIGS = {64: Config(8, 1, {"ROWS": 128}), 128: Config(8, 1, {"ROWS": 64})}
"""By head dimension, on every generation: 32 numbers a thread, and 64 bytes of a channel in a row. Reasoned and compiled
without spills, not yet measured."""


def _grid(v: Tensor, rows: int, lengths: Tensor, config: Config) -> tuple[int, ...]:
    return -(-rows // config.blocks["ROWS"]), v.shape[1], lengths.shape[0]


def _launch_amax(generation: Generation, v: Tensor, bounds: Tensor, lengths: Tensor, max_length: int, amax: Tensor) -> Launch:
    check_head_dim(v.shape[2])
    config = CONFIGS[v.shape[2]]
    arguments = head_strided(v=v) | {"bounds_ptr": bounds, "lengths_ptr": lengths, "amax_ptr": amax, "D": v.shape[2]}
    return Launch("value_amax", _value_amax_kernel, _grid(v, max_length, lengths, config), arguments, config)


@operation(writes=("amax",), launch=_launch_amax)
def value_amax_into(v: Tensor, bounds: Tensor, lengths: Tensor, max_length: int, amax: Tensor) -> None:
    """Raise `amax`, which begins as zeros, to the largest magnitudes."""
    for i, (start, length) in enumerate(zip(bounds.tolist(), lengths.tolist(), strict=False)):
        amax[i] = torch.maximum(amax[i], v[start : start + length].abs().amax(0).to(amax.dtype))


def _launch(
    generation: Generation, v: Tensor, amax: Tensor, bounds: Tensor, lengths: Tensor, max_capacity: int, values: Tensor
) -> Launch:
    check_head_dim(v.shape[2])
    config = CONFIGS[v.shape[2]]
    arguments = head_strided(v=v) | {
        "amax_ptr": amax,
        "bounds_ptr": bounds,
        "lengths_ptr": lengths,
        "values_ptr": values,
        "count": v.shape[0],
        "D": v.shape[2],
    }
    return Launch("quantize_values", _quantize_values_kernel, _grid(v, max_capacity, lengths, config), arguments, config)


@operation(writes=("values",), launch=_launch)
def quantize_values_into(v: Tensor, amax: Tensor, bounds: Tensor, lengths: Tensor, max_capacity: int, values: Tensor) -> None:
    """Fill `values`; zeros where a row belongs to no token."""
    inverse = torch.full_like(amax, 448.0) / amax.clamp(min=SMALLEST_AMAX)
    values.zero_()
    for i, (start, length) in enumerate(zip(bounds.tolist(), lengths.tolist(), strict=False)):
        rows = slice(start, start + length)
        scaled = (v[rows].to(inverse.dtype) * inverse[i]).clamp(-448.0, 448.0)
        values[:, :, rows] = scaled.to(ELEMENT).permute(1, 2, 0)


def quantize_values(v: Tensor, layout: Ragged) -> tuple[Tensor, Tensor]:
    """Quantise every channel of every sequence with a scale of its own.

    Args:
        v: [T, H, D], heads contiguous; D 64 or 128 on a GPU.
        layout: where its sequences lie.

    Returns:
        Values, float8_e4m3fn [H, D, T], and the largest magnitudes, float32 [S, H, D], for which 448 stands. A channel with a
        NaN or an infinity gives what is not finite when it is multiplied out.
    """
    count, heads, head_dim = v.shape
    amax = torch.zeros(len(layout), heads, head_dim, dtype=torch.float32, device=v.device)
    values = torch.empty(heads, head_dim, count, dtype=ELEMENT, device=v.device)
    value_amax_into(v, layout.bounds_tensor, layout.lengths_tensor, layout.max_length, amax)
    quantize_values_into(v, amax, layout.bounds_tensor, layout.lengths_tensor, layout.max_capacity, values)
    return values, amax


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """One sequence with padding rows, heads of 128 and of 64."""
    if generation not in GENERATIONS:
        return
    layout = Ragged.pack([size.rows - 3], size.device)
    where = layout.bounds_tensor, layout.lengths_tensor
    for head_dim in HEAD_DIMS:
        heads, is_hot = size.width // head_dim, head_dim == 128
        v = size.normal(size.rows, heads, head_dim)
        zeros = torch.zeros(1, heads, head_dim, device=size.device)
        yield Example(f"value_amax {head_dim}", value_amax_into, (v, *where, layout.max_length, zeros), is_hot=is_hot)
        amax = v[layout.span(0)].float().abs().amax(0, keepdim=True)
        values = size.unwritten(heads, head_dim, size.rows, dtype=ELEMENT)
        operands = (v, amax, *where, layout.max_capacity, values)
        yield Example(f"quantize_values {head_dim}", quantize_values_into, operands, is_hot=is_hot)
