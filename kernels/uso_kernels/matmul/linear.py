"""A matrix product in floating point, each sequence of a packed batch by itself.

    y = x weight^T + bias

2 M N K operations, left to PyTorch's own product: on a GPU the bias is part of it. Its bits are those of
`torch.nn.functional.linear`.

A library chooses how it blocks a product by the number of rows, and with the blocking the order of the sums. On CPUs with AMX
(bfloat16), in MKL under AVX2 (float32) and in cuBLAS, a row's bits therefore change with the rows beside it, aligned or not.
So a product of a packed batch is one call per sequence: its shape, and with it every bit, depends on that sequence alone.

On a CPU without bfloat16 products (`uso_kernels.cpu`) such operands are widened, `CHUNK_ROWS` rows at a time counted from their
sequence's first, multiplied in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.cpu import widens
from uso_kernels.launch import needs_gradient
from uso_kernels.ragged import Ragged

CHUNK_ROWS = 512
"""Rows whose float32 sums are alive at once: they are rounded while they are in the cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, sequences: Ragged | None = None) -> Tensor:
    """Multiply by a transposed matrix and add a bias.

    Args:
        x: [M, K]; without `sequences` also [..., K].
        weight: [N, K], x's dtype; rows may be strided.
        bias: [N] in x's dtype, or None.
        sequences: where the sequences of a packed x lie; None where x is one. Autograd records one product of all.

    Returns:
        [M, N] (or [..., N]) in x's dtype.

    Raises:
        ValueError: x has more than two dimensions beside several sequences, or other rows than they.
    """
    records, wide = needs_gradient(x, weight, bias), widens(x.dtype, x.device)
    if records or (not wide and (sequences is None or len(sequences) == 1)):
        return F.linear(x, weight, bias)
    if sequences is not None and x.ndim != 2:
        raise ValueError(f"with sequences, x must be a matrix, got shape {tuple(x.shape)}")
    if wide:
        matrix = x.reshape(-1, x.shape[-1])
        return _widened(matrix, weight, bias, rows_of(sequences, len(matrix))).view(*x.shape[:-1], len(weight))
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in rows_of(sequences, x.shape[0]):
        if bias is None:
            torch.mm(x[rows], weight.t(), out=y[rows])
        else:
            torch.addmm(bias, x[rows], weight.t(), out=y[rows])
    return y


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None, sequences: tuple[slice, ...]) -> Tensor:
    """The product in float32, rounded once to x's dtype."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    columns, added = weight.float().t(), None if bias is None else bias.float()
    sums = y.new_empty(min(CHUNK_ROWS, len(y)), len(weight), dtype=torch.float32)
    for rows in sequences:
        for start in range(rows.start, rows.stop, CHUNK_ROWS):
            chunk = slice(start, min(start + CHUNK_ROWS, rows.stop))
            into = sums[: chunk.stop - chunk.start]
            if added is None:
                torch.mm(x[chunk].float(), columns, out=into)
            else:
                torch.addmm(added, x[chunk].float(), columns, out=into)
            y[chunk] = into
    return y


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
