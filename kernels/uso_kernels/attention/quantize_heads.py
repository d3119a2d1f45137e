"""Queries and keys as 8-bit integers, with a float32 scale for each token and head, for attention in 8 bits.

    amax = max(max|x|, 1e-30) over a head's columns      scale = amax / 127      values = round(x * (127 / amax))

Two bytes read and one written for each number of q and k, in one launch; four bytes for each scale. A head's scales lie side
by side, since a tile of attention reads those of its keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, head_strided, jit, tl
from uso_kernels.operation import operation
from uso_kernels.rows import quantize_rows_reference, quantized

GENERATIONS: tuple[Generation, ...] = ("ada", "hopper", "blackwell_consumer")
"""Where 8-bit attention has kernels. Older GPUs have no 8-bit floats; on Blackwell's data-centre GPUs Triton multiplies 8-bit
integers by the instructions of their predecessors, past the fast units."""
HEAD_DIMS = (64, 128)


def check_head_dim(head_dim: int) -> None:
    """Check that kernels have tiles for a head's columns.

    Raises:
        ValueError: they have not.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dimensions {HEAD_DIMS} have kernels, got {head_dim}")


@jit
def _quantize_head(x_ptr, x_stride, x_head_stride, values_ptr, scale_ptr, count, D: tl.constexpr, ROWS: tl.constexpr):
    """One head of some rows."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    columns, mask = tl.arange(0, D)[None, :], rows < count
    source = x_ptr + rows[:, None] * x_stride + head * x_head_stride + columns
    x = tl.load(source, mask=mask[:, None], other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
    # A plain maximum drops NaN; a broken row must not come out looking sound.
    is_nan = tl.max((x != x).to(tl.int32), axis=1)
    amax = tl.where(is_nan > 0, float("nan"), amax)
    tl.store(scale_ptr + head * count + rows, tl.div_rn(amax, 127.0), mask=mask)
    values = quantized(x, tl.div_rn(127.0, amax)[:, None], 127.0, values_ptr.dtype.element_ty)
    tl.store(values_ptr + (rows[:, None] * heads + head) * D + columns, values, mask=mask[:, None])


@jit
def _quantize_heads_kernel(
    q_ptr,  # [T_q, heads, D]
    q_stride,
    q_head_stride,
    q_values_ptr,  # [T_q, heads, D], int8, contiguous
    q_scale_ptr,  # [heads, T_q] float32, contiguous
    q_rows,  # T_q
    k_ptr,  # [T, heads, D]
    k_stride,
    k_head_stride,
    k_values_ptr,  # [T, heads, D], int8, contiguous
    k_scale_ptr,  # [heads, T] float32, contiguous
    k_rows,  # T
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(2) == 0:
        _quantize_head(q_ptr, q_stride, q_head_stride, q_values_ptr, q_scale_ptr, q_rows, D, ROWS)
    else:
        _quantize_head(k_ptr, k_stride, k_head_stride, k_values_ptr, k_scale_ptr, k_rows, D, ROWS)


CONFIGS = {64: Config(4, 1, {"ROWS": 64}), 128: Config(4, 1, {"ROWS": 32})}
"""By head dimension, on every generation: 32 numbers a thread. Reasoned and compiled without spills, not yet measured."""


def _launch(
    generation: Generation, q: Tensor, k: Tensor, q_values: Tensor, q_scale: Tensor, k_values: Tensor, k_scale: Tensor
) -> Launch:
    heads, head_dim = q.shape[1:]
    check_head_dim(head_dim)
    config = CONFIGS[head_dim]
    arguments = head_strided(q=q, k=k) | {
        "q_values_ptr": q_values,
        "q_scale_ptr": q_scale,
        "q_rows": q.shape[0],
        "k_values_ptr": k_values,
        "k_scale_ptr": k_scale,
        "k_rows": k.shape[0],
        "D": head_dim,
    }
    grid = (-(-max(q.shape[0], k.shape[0]) // config.blocks["ROWS"]), heads, 2)
    return Launch("quantize_heads", _quantize_heads_kernel, grid, arguments, config)


@operation(writes=("q_values", "q_scale", "k_values", "k_scale"), launch=_launch)
def quantize_heads_into(q: Tensor, k: Tensor, q_values: Tensor, q_scale: Tensor, k_values: Tensor, k_scale: Tensor) -> None:
    """Fill values and scales of q and k."""
    for x, values, scale in ((q, q_values, q_scale), (k, k_values, k_scale)):
        rows = quantize_rows_reference(x.flatten(0, 1), torch.int8)
        values.copy_(rows.values.view(x.shape))
        scale.copy_(rows.scale.view(x.shape[:2]).t())


def quantize_heads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise every head of every token with a scale of its own.

    Args:
        q: [T_q, H, D], heads contiguous; D 64 or 128 on a GPU.
        k: [T, H, D].

    Returns:
        Values of q, int8 [T_q, H, D], and their scales, float32 [H, T_q]; those of k. A head of zeros gives zeros; one
        with a NaN or an infinity gives what is not finite when it is multiplied out.
    """
    made = [out for x in (q, k) for out in _unwritten(x)]
    quantize_heads_into(q, k, *made)
    return made[0], made[1], made[2], made[3]


def _unwritten(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[1], x.shape[0], dtype=torch.float32, device=x.device),
    )


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """Heads of 128 and of 64."""
    if generation not in GENERATIONS:
        return
    for head_dim in HEAD_DIMS:
        heads = size.width // head_dim
        q, k = size.normal(2, size.rows, heads, head_dim)
        unwritten = []
        for _ in (q, k):
            unwritten += [size.unwritten(*q.shape, dtype=torch.int8), size.unwritten(heads, size.rows, dtype=torch.float32)]
        yield Example(f"quantize_heads {head_dim}", quantize_heads_into, (q, k, *unwritten), is_hot=head_dim == 128)
