"""Attention within each sequence of a packed batch, without masks and not causal.

    out[i] = softmax(q[i] k^T / sqrt(D)) v      over the tokens of i's own sequence

4 L_q L_k C FLOPs per sequence. Queries may be fewer than keys (the last single block needs only the image rows).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import Ragged


def attention_reference(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Plain PyTorch version of `attention`: one dense call per sequence."""
    pieces: list[Tensor] = []
    for i in range(len(queries)):
        span, key_span = queries.span(i), keys.span(i)
        dense = (q[span].transpose(0, 1)[None], k[key_span].transpose(0, 1)[None], v[key_span].transpose(0, 1)[None])
        pieces.append(F.scaled_dot_product_attention(*dense)[0].transpose(0, 1))
        end = queries.starts[i + 1] if i + 1 < len(queries) else queries.rows
        if end > span.stop:
            pieces.append(q.new_zeros(end - span.stop, *q.shape[1:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within each sequence.

    Args:
        q: [T_q, H, D].
        k: [T, H, D], q's dtype.
        v: [T, H, D], q's dtype.
        queries: where each sequence's queries lie.
        keys: where its keys and values lie; as many sequences as `queries`.

    Returns:
        [T_q, H, D] in q's dtype; rows that belong to no token are zero.
    """
    return attention_reference(q, k, v, queries, keys)
