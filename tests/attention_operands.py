"""Queries, keys and values of ragged sequences, and attention by its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kernel_runs import drawn
from torch import Tensor

from uso_kernels.ragged import Ragged

CPU = ("cpu", torch.float32)


def operands(
    lengths: Sequence[int],
    place: tuple[str, torch.dtype] = CPU,
    heads: int = 2,
    head_dim: int = 64,
    *,
    means: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> tuple[Tensor, Tensor, Tensor, Ragged]:
    """q, k and v of these means, with padding rows that would poison every result they reached."""
    layout = Ragged.pack(lengths, place[0])
    q, k, v = (drawn(layout.rows, heads, head_dim, seed=seed, place=place, mean=mean) for seed, mean in enumerate(means))
    if layout.token_rows is not None:
        padding = torch.ones(layout.rows, dtype=torch.bool, device=place[0])
        padding[layout.token_rows] = False
        for x in (q, k, v):
            x[padding] = float("nan")
    return q, k, v, layout


def exact(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attention by its definition, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for i in range(len(queries)):
        rows, key_rows = queries.span(i), keys.span(i)
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k[key_rows].double()) / math.sqrt(q.shape[2])
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[key_rows].double())
    return out
