"""A matrix product in floating point, each sequence of a packed batch by itself.

    y = x weight^T + bias

2 M N K operations, left to PyTorch's own product: on a GPU the bias is part of it, as long as `out` is contiguous. Its bits are
those of `torch.nn.functional.linear`, which has no `out`.

A library chooses how it blocks a product by the number of rows, and with the blocking the order of the sums. On CPUs with AMX
(bfloat16), in MKL under AVX2 (float32) and in cuBLAS, a row's bits therefore change with the rows beside it, aligned or not.
So a product of a packed batch is one call per sequence: its shape, and with it every bit, depends on that sequence alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import needs_gradient
from .operands import result_like
from .ragged import Ragged


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sequences: Ragged | None = None, out: Tensor | None = None
) -> Tensor:
    """Multiply by a transposed matrix and add a bias.

    Args:
        x: [M, K]; without `sequences` and `out` also [..., K].
        weight: [N, K], x's dtype; rows may be strided.
        bias: [N] in x's dtype, or None.
        sequences: where the sequences of a packed x lie; None where x is one.
        out: [M, N], where the result goes. Not written to where autograd records the operation, whose result is a new tensor.

    Returns:
        [M, N] (or [..., N]) in x's dtype.

    Raises:
        ValueError: `out` has another shape, dtype or device, x has more than two dimensions beside it, or other rows than the
            sequences.
    """
    several = sequences is not None and len(sequences) > 1
    if needs_gradient(x, weight, bias) or (out is None and not several):
        return F.linear(x, weight, bias)
    if x.ndim != 2:
        raise ValueError(f"with sequences or out, x must be a matrix, got shape {tuple(x.shape)}")
    out = result_like(x, out, (x.shape[0], weight.shape[0]))
    for rows in rows_of(sequences, x.shape[0]):
        if bias is None:
            torch.mm(x[rows], weight.t(), out=out[rows])
        else:
            torch.addmm(bias, x[rows], weight.t(), out=out[rows])
    return out


def rows_of(sequences: Ragged | None, rows: int) -> tuple[slice, ...]:
    """The rows that one product multiplies, for every product of a packed matrix.

    Raises:
        ValueError: the matrix has other rows than the sequences.
    """
    if sequences is None:
        return (slice(0, rows),)
    if sequences.rows != rows:
        raise ValueError(f"the sequences have {sequences.rows} rows, x has {rows}")
    return sequences.row_slices
