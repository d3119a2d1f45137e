"""Split a fused q/k/v projection, normalise q and k per head, turn them by their positions, and place all three in joint order.

    q = rope(q / sqrt(mean(q^2) + eps) * q_scale),  k likewise,  v unchanged
    rope: (a, b) -> (a cos - b sin, a sin + b cos) for each pair of neighbouring columns

One read of 3C and one write of 3C per row; cos and sin are D/2 float32 each per row, shared by all heads. Source: FLUX.1's
QKNorm and EmbedND, ByteDance USO ``uso/flux/math.py`` for what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import row_blocks
from .example import Example, Size
from .launch import Config, Generation, Launch, head_strided, jit, needs_gradient, strided, tl
from .operands import check_matrix, check_row_index
from .operation import Fill, operation
from .whole_vectors import whole_vectors


def _norm_rope(x: Tensor, scale: Tensor, turn: Tensor, eps: float) -> Tensor:
    """RMSNorm over the head dimension, then the rotation, not rounded. x [T, H, D]; turn complex [T, 1, D/2], cos + i sin.

    A pair of columns is a complex number: one multiplication instead of six passes over every second column.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    mean_square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]
    factor = (mean_square + eps).rsqrt()
    # Where it is a copy that no gradient needs, in its place.
    y = y * factor if y is x or torch.is_grad_enabled() else y.mul_(factor)
    y.mul_(scale.to(wide))
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    for rows in whole_vectors(pairs):
        pairs[rows].mul_(turn[rows])
    return y


@jit
def _norm_and_turn(values, scale, cos, sin, eps, HEADS: tl.constexpr, D: tl.constexpr):
    """RMSNorm and rotation of float32 [HEADS, D]; scale is [1, D], cos and sin are [1, D / 2]."""
    mean_square = tl.sum(values * values, axis=1) / D
    # Scaled before pairs are taken apart: a thread then reads its columns' scales at once, as it reads the values.
    values = values * (1.0 / tl.sqrt_rn(mean_square + eps))[:, None] * scale
    even, odd = tl.split(tl.reshape(values, (HEADS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, D))


@jit
def _qk_norm_rope_kernel(
    qkv_ptr,  # [R, 3 * heads * D]
    qkv_stride,
    q_scale_ptr,  # [D]
    k_scale_ptr,  # [D]
    cos_ptr,  # [T, D / 2] float32
    sin_ptr,  # [T, D / 2] float32
    turn_stride,
    rows_ptr,  # [R] int64, or None
    q_ptr,  # [T, heads, D]
    q_stride,
    q_head_stride,
    k_ptr,  # [T, heads, D]
    k_stride,
    k_head_stride,
    v_ptr,  # [T, heads, D], or None
    v_stride,
    v_head_stride,
    heads,
    eps,
    HAS_ROWS: tl.constexpr,
    HAS_V: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(rows_ptr + row) if HAS_ROWS else row
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, D)[None, :]
    mask = (head < heads) & (column < D)
    half = tl.arange(0, D // 2)[None, :]
    cos = tl.load(cos_ptr + target * turn_stride + half)
    sin = tl.load(sin_ptr + target * turn_stride + half)

    source = qkv_ptr + row * qkv_stride + head * D + column
    scale = tl.load(q_scale_ptr + column).to(tl.float32)
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    values = _norm_and_turn(values, scale, cos, sin, eps, HEADS, D)
    tl.store(q_ptr + target * q_stride + head * q_head_stride + column, values.to(q_ptr.dtype.element_ty), mask=mask)

    scale = tl.load(k_scale_ptr + column).to(tl.float32)
    values = tl.load(source + heads * D, mask=mask, other=0.0).to(tl.float32)
    values = _norm_and_turn(values, scale, cos, sin, eps, HEADS, D)
    tl.store(k_ptr + target * k_stride + head * k_head_stride + column, values.to(k_ptr.dtype.element_ty), mask=mask)

    if HAS_V:
        values = tl.load(source + 2 * heads * D, mask=mask, other=0.0)
        tl.store(v_ptr + target * v_stride + head * v_head_stride + column, values, mask=mask)


CONFIGS = {64: Config(4, 1, {"HEADS": 16}), 128: Config(4, 1, {"HEADS": 8})}
"""By head dimension, on every generation: 1024 numbers a program, so that a thread reads 16 bytes of bfloat16 at a time.
Reasoned and compiled without spills, not yet measured."""


def _launch(
    generation: Generation,
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    eps: float,
) -> Launch:
    heads, head_dim = q.shape[1:]
    if head_dim not in CONFIGS:
        raise ValueError(f"head dimensions {tuple(CONFIGS)} have kernels, got {head_dim}")
    config = CONFIGS[head_dim]
    arguments = {
        **strided(qkv=qkv),
        **head_strided(q=q, k=k, v=v),
        "q_scale_ptr": q_scale,
        "k_scale_ptr": k_scale,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "turn_stride": cos.stride(0),
        "rows_ptr": rows,
        "heads": heads,
        "eps": eps,
        "HAS_ROWS": rows is not None,
        "HAS_V": v is not None,
        "D": head_dim,
    }
    grid = (qkv.shape[0], -(-heads // config.blocks["HEADS"]))
    return Launch("qk_norm_rope", _qk_norm_rope_kernel, grid, arguments, config)


def _check_operands(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    eps: float,
) -> None:
    if q.ndim != 3 or q.shape != k.shape or (v is not None and q.shape != v.shape):
        shapes = [None if x is None else tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v must be [T, H, D] of one shape, got {shapes}")
    joint_rows, heads, width = q.shape
    if width % 2:
        raise ValueError(f"rotary embeddings turn pairs: the head dimension must be even, got {width}")
    check_matrix("qkv", qkv, width=3 * heads * width)
    for name, target in (("q", q), ("k", k), ("v", v)):
        if target is not None and (target.dtype != qkv.dtype or target.device != qkv.device or target.stride(2) != 1):
            raise ValueError(
                f"{name} must be {qkv.dtype} on {qkv.device} with contiguous heads, got {target.dtype} on {target.device}"
            )
    for name, weight in (("q_scale", q_scale), ("k_scale", k_scale)):
        if weight.shape != (width,) or not weight.is_contiguous() or weight.device != qkv.device:
            found = f"{tuple(weight.shape)} on {weight.device}"
            raise ValueError(f"{name} must be contiguous [{width}] on {qkv.device}, got {found}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (joint_rows, width // 2) or table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 [{joint_rows}, {width // 2}], got {table.dtype} {tuple(table.shape)}")
        if table.stride(1) != 1 or table.stride(0) != cos.stride(0) or table.device != qkv.device:
            raise ValueError(f"cos and sin must have contiguous columns and equal strides on {qkv.device}")
    if rows is not None:
        check_row_index("rows", rows, qkv.shape[0], qkv.device)
    elif qkv.shape[0] != joint_rows:
        raise ValueError(f"without a row index the stream is the joint order: expected {joint_rows} rows, got {qkv.shape[0]}")


@operation(writes=("q", "k", "v"), launch=_launch, check=_check_operands)
def qk_norm_rope_into(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    eps: float,
) -> None:
    """Write one stream's rows of q and k, and of v where there is one."""
    heads, width = q.shape[1:]
    pieces = qkv.view(qkv.shape[0], 3, heads, width)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    for block in row_blocks(qkv, heads * width):
        places = None if rows is None else rows[block]
        row_cos, row_sin = (x[block] if places is None else x.index_select(0, places) for x in (cos, sin))
        turn = torch.complex(row_cos.to(wide), row_sin.to(wide))[:, None]
        block_q, block_k, block_v = pieces[block].unbind(1)
        new = (_norm_rope(block_q, q_scale, turn, eps), _norm_rope(block_k, k_scale, turn, eps))
        for target, source in zip((q, k, v), (*new, block_v), strict=True):
            if target is None:
                continue
            if places is None:
                target[block].copy_(source)
            else:
                target.index_copy_(0, places, source.to(target.dtype))


def qk_norm_rope(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    eps: float = 1e-6,
    *,
    call: Fill = qk_norm_rope_into,
) -> None:
    """Write one stream's queries and keys into the joint attention layout, and its values where they have to move.

    Args:
        qkv: [R, 3C], the stream's projection: q, k and v side by side, each H heads of D columns; rows may be strided.
        q_scale: [D], RMSNorm weight of the queries.
        k_scale: [D], RMSNorm weight of the keys.
        cos: float32 [T, D/2], by joint row.
        sin: float32 [T, D/2], by joint row.
        rows: int64 [R], the joint row of each row of the stream, no row twice; None where the stream is in joint order (R = T).
        q: [T, H, D], written at `rows`; D is 64 or 128 on a GPU.
        k: [T, H, D], written at `rows`.
        v: [T, H, D], written at `rows`; None where attention reads the values in qkv, where they are.
        eps: added to the mean square.
        call: the operation, or a `CallSite` of it.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(qkv, q_scale, k_scale):
        _check_operands(qkv, q_scale, k_scale, cos, sin, rows, q, k, v, eps)
        qk_norm_rope_into.reference(qkv, q_scale, k_scale, cos, sin, rows, q, k, v, eps)
    else:
        call(qkv, q_scale, k_scale, cos, sin, rows, q, k, v, eps)


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """Heads of 128 in joint order and scattered into it, as blocks have them, and heads of 64."""
    order = torch.arange(size.rows, device=size.device)
    for head_dim, rows, kind in ((128, order.flip(0), "scattered"), (128, None, "joint"), (64, None, "joint")):
        heads = size.width // head_dim
        q, k, v = size.unwritten(3, size.rows, heads, head_dim)
        angles = size.normal(size.rows, head_dim // 2, dtype=torch.float32)
        weights, qkv = size.normal(2, head_dim), size.normal(size.rows, 3 * size.width)
        for moved, name in ((v, ""), (None, ", v left")) if rows is None else ((v, ""),):
            operands = (qkv, *weights, angles.cos(), angles.sin(), rows, q, k, moved, 1e-6)
            yield Example(f"qk_norm_rope {head_dim} {kind}{name}", qk_norm_rope_into, operands, is_hot=head_dim == 128)
