"""Split a fused q/k/v projection, normalise q and k per head, turn them by their positions, and place all three in joint order.

    q = rope(q / sqrt(mean(q^2) + eps) * q_scale),  k likewise,  v unchanged
    rope: (a, b) -> (a cos - b sin, a sin + b cos) for each pair of neighbouring columns

One read of 3C and one write of 3C per row; cos and sin are D/2 float32 each per row, shared by all heads. Source: FLUX.1's
QKNorm and EmbedND, ByteDance USO ``uso/flux/math.py`` for what is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm_modulate import wide_dtype


def _norm_rope(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over the head dimension, then the rotation. x [T, H, D]; cos, sin [T, 1, D/2]."""
    wide = wide_dtype(x.dtype)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * scale.to(wide)
    even, odd = y[..., 0::2], y[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-6,
) -> None:
    """Plain PyTorch version of `qk_norm_rope`, with the same arguments."""
    heads, width = q.shape[1:]
    parts = qkv.view(qkv.shape[0], 3, heads, width)
    row_cos, row_sin = (cos, sin) if rows is None else (cos.index_select(0, rows), sin.index_select(0, rows))
    wide = wide_dtype(qkv.dtype)
    row_cos, row_sin = row_cos.to(wide)[:, None], row_sin.to(wide)[:, None]
    new = (_norm_rope(parts[:, 0], q_scale, row_cos, row_sin, eps), _norm_rope(parts[:, 1], k_scale, row_cos, row_sin, eps))
    for target, source in zip((q, k, v), (*new, parts[:, 2]), strict=True):
        if rows is None:
            target.copy_(source)
        else:
            target.index_copy_(0, rows, source)


def qk_norm_rope(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-6,
) -> None:
    """Write one stream's queries, keys and values into the joint attention layout.

    Args:
        qkv: [R, 3C], the stream's projection: q, k and v side by side, each H heads of D columns; rows may be strided.
        q_scale: [D], RMSNorm weight of the queries.
        k_scale: [D], RMSNorm weight of the keys.
        cos: float32 [T, D/2], by joint row.
        sin: float32 [T, D/2], by joint row.
        rows: int64 [R], the joint row of each row of the stream, no row twice; None where the stream is the joint order (R = T).
        q: [T, H, D], written at `rows`.
        k: [T, H, D], written at `rows`.
        v: [T, H, D], written at `rows`.
        eps: added to the mean square.
    """
    qk_norm_rope_reference(qkv, q_scale, k_scale, cos, sin, rows, q, k, v, eps)
