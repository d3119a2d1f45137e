"""A matrix product in floating point, into memory of the caller's.

    y = x weight^T + bias

2 M N K operations, left to PyTorch's own product: on a GPU the bias is part of it, as long as `out` is contiguous. Its bits are
those of `torch.nn.functional.linear`, which has no `out`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import needs_gradient
from .operands import result_like


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Multiply by a transposed matrix and add a bias.

    Args:
        x: [M, K]; without `out` also [..., K].
        weight: [N, K], x's dtype; rows may be strided.
        bias: [N] in x's dtype, or None.
        out: [M, N], where the result goes. Not written to where autograd records the operation, whose result is a new tensor.

    Returns:
        [M, N] (or [..., N]) in x's dtype.

    Raises:
        ValueError: `out` has another shape, dtype or device, or x has more than two dimensions beside it.
    """
    if out is None or needs_gradient(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.ndim != 2:
        raise ValueError(f"with out, x must be a matrix, got shape {tuple(x.shape)}")
    out = result_like(x, out, (x.shape[0], weight.shape[0]))
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
