"""Attention on a CPU as plain matrix products: each head's queries in chunks, each chunk's scores whole.

    p = softmax(q_chunk k^T / sqrt(D))      out_chunk = p v

4 L_q L_k D FLOPs per head; the scores of one chunk (`CHUNK_ROWS` x L_k) stay in the cache between the products. In bfloat16
both products then run at the CPU's full rate, which `scaled_dot_product_attention` does not reach; scores and weights are
rounded to bfloat16 in between, so the error against float64 is about 4.5e-3 relative where that function's is 2.3e-3 (L
2752, unit-norm queries and keys times sqrt(D)). In float32 it is as exact and slower. Every product's shape depends on its
own sequence alone, so a sequence's bits do not depend on its company.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uso_kernels.ragged import Ragged

CHUNK_ROWS = 512


def chunked_attention_missing(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    return None if device.type == "cpu" else "it is made for CPUs"


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within each sequence; operands as `uso_kernels.attention.attention` has checked them."""
    out = q.new_empty(q.shape)
    scores = q.new_empty(min(CHUNK_ROWS, queries.max_length) * keys.max_length)
    for i in range(len(queries)):
        span, key_span = queries.span(i), keys.span(i)
        length, key_length = queries.lengths[i], keys.lengths[i]
        for head in range(q.shape[1]):
            head_q, head_k, head_v = q[span, head], k[key_span, head].t(), v[key_span, head]
            head_out = out[span, head]
            for start in range(0, length, CHUNK_ROWS):
                rows = slice(start, min(start + CHUNK_ROWS, length))
                chunk = scores[: (rows.stop - start) * key_length].view(-1, key_length)
                # beta 0: `chunk` is written, not read; alpha scales the float32 sums before they are rounded.
                torch.addmm(chunk, head_q[rows], head_k, beta=0, alpha=1 / math.sqrt(q.shape[2]), out=chunk)
                torch.softmax(chunk, -1, out=chunk)
                torch.mm(chunk, head_v, out=head_out[rows])
        out[span.stop : queries.end(i)] = 0
    return out
