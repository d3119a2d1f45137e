"""A matrix product in floating point, each sequence of a packed batch by itself.

    y = x weight^T + bias      or GELU of it, or the sum over parts of x and of weight's columns

2 M N K operations, left to PyTorch's own product: on a GPU bias and GELU are part of it, on a CPU in bfloat16 where oneDNN
multiplies. Without GELU and parts its bits are those of `torch.nn.functional.linear`.

A library chooses how it blocks a product by the number of rows, and with the blocking the order of the sums. On CPUs with AMX
(bfloat16), in MKL under AVX2 (float32) and in cuBLAS, a row's bits therefore change with the rows beside it, aligned or not.
So a product of a packed batch is one call per sequence: its shape, and with it every bit, depends on that sequence alone.

On a CPU without bfloat16 products (`uso_kernels.cpu`) such operands are widened, `CHUNK_ROWS` rows at a time counted from their
sequence's first, multiplied in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.cpu import activates, product_with_gelu, widens
from uso_kernels.launch import needs_gradient
from uso_kernels.operands import result_like
from uso_kernels.ragged import Ragged
from uso_kernels.whole_vectors import gelu as activate

CHUNK_ROWS = 512
"""Rows whose float32 sums are alive at once: they are rounded while they are in the cache."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    sequences: Ragged | None = None,
    *,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply by a transposed matrix and add a bias.

    Args:
        x: [M, K]; without `sequences` and `out` also [..., K].
        weight: [N, K], x's dtype; rows may be strided.
        bias: [N] in x's dtype, or None.
        sequences: where the sequences of a packed x lie; None where x is one. Autograd records one product of all.
        gelu: whether GELU follows, in its tanh form. Where it is part of the product the sums are not rounded before.
        out: [M, N], where the result goes.

    Returns:
        [M, N] (or [..., N]) in x's dtype.

    Raises:
        ValueError: x has more than two dimensions beside several sequences, or other rows than they.
    """
    if needs_gradient(x, weight, bias):
        result = F.linear(x, weight, bias)
        result = activate(result) if gelu else result
        return result if out is None else out.copy_(result)
    has_many = sequences is not None and len(sequences) > 1
    if not (has_many or gelu or out is not None or widens(x)):
        return F.linear(x, weight, bias)
    if (has_many or out is not None) and x.ndim != 2:
        raise ValueError(f"with sequences, x must be a matrix, got shape {tuple(x.shape)}")
    matrix = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    spans = rows_of(sequences, matrix.shape[0])
    if gelu and bias is not None and out is None and not has_many and activates(x):
        # A product that has memory of its own: no other is asked for beside it.
        return product_with_gelu(matrix, weight, bias).view(*x.shape[:-1], weight.shape[0])
    y = result_like(x, out, (matrix.shape[0], weight.shape[0]))
    _fill(y, (matrix,), (weight,), bias, spans, gelu=gelu)
    return y.view(*x.shape[:-1], weight.shape[0]) if x.ndim != 2 else y


def linear_of_parts(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, sequences: Ragged | None = None
) -> Tensor:
    """Multiply the columns of a matrix that lie in several tensors: what the first part gives is added to by the next.

    Args:
        parts: [M, K_i] each, in the order of the weight's columns.
        weight: [N, sum of K_i], the parts' dtype; rows may be strided.
        bias: [N], or None.
        sequences: as for `linear`.

    Returns:
        [M, N]; in 16 bits the sum is rounded after each part, but where operands are widened.

    Raises:
        ValueError: parts that together have other columns than the weight.
    """
    columns = columns_of(weight, [part.shape[1] for part in parts])
    if needs_gradient(*parts, weight, bias):
        return F.linear(torch.cat(tuple(parts), dim=1), weight, bias)
    y = parts[0].new_empty(parts[0].shape[0], weight.shape[0])
    _fill(y, parts, columns, bias, rows_of(sequences, len(y)))
    return y


def columns_of(weight: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The columns of a weight [N, K] that multiply each part of a matrix, [N, width] each.

    Raises:
        ValueError: the widths are not K together.
    """
    if sum(widths) != weight.shape[1]:
        raise ValueError(f"the parts have {sum(widths)} columns together, the weight has {weight.shape[1]}")
    return list(weight.split_with_sizes(list(widths), dim=1))


def _fill(
    y: Tensor,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    sequences: tuple[slice, ...],
    *,
    gelu: bool = False,
) -> None:
    """Write the sum of the parts' products to y, sequence by sequence."""
    if widens(y):
        _fill_widened(y, parts, weights, bias, sequences, gelu=gelu)
        return
    for rows in sequences:
        target = y[rows]
        if gelu and bias is not None and activates_in_product(y):
            activated_product(parts[0][rows], weights[0], bias, out=target)
            continue
        _add_products(target, parts, weights, bias, rows)
        if gelu:
            activate(target, target)


def activates_in_product(y: Tensor) -> bool:
    """Whether a library's product of a tensor's type and device can end in GELU's tanh form."""
    return y.is_cuda or activates(y)


def activated_product(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """GELU of one product, for operands of which `activates_in_product` is true; [M, K] and [N, K] to [M, N]."""
    if x.is_cuda and out is None:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    y = product_with_gelu(x, weight, bias)  # On a CPU `_addmm_activation` takes GELU's other form.
    return y if out is None else out.copy_(y)


def _add_products(target: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, rows: slice) -> None:
    """Write the sum of the parts' products for some rows; the parts are brought to the target's dtype."""
    for part, weight in zip(parts, weights, strict=True):
        x = part[rows].to(target.dtype)
        if part is not parts[0]:
            torch.addmm(target, x, weight.t(), out=target)
        elif bias is None:
            torch.mm(x, weight.t(), out=target)
        else:
            torch.addmm(bias, x, weight.t(), out=target)


def _fill_widened(
    y: Tensor,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    sequences: tuple[slice, ...],
    *,
    gelu: bool,
) -> None:
    """The same in float32, rounded once to y's dtype."""
    wide_weights, wide_bias = [weight.float() for weight in weights], None if bias is None else bias.float()
    sums = y.new_empty(min(CHUNK_ROWS, y.shape[0]), y.shape[1], dtype=torch.float32)
    for rows in sequences:
        for start in range(rows.start, rows.stop, CHUNK_ROWS):
            chunk = slice(start, min(start + CHUNK_ROWS, rows.stop))
            target = sums[: chunk.stop - chunk.start]
            _add_products(target, parts, wide_weights, wide_bias, chunk)
            y[chunk] = activate(target, target) if gelu else target


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
