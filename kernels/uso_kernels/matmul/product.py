"""Products by one weight at one place of a step, prepared: what no call changes is looked at once.

    y = x weight^T + bias      or GELU of it, or the sum over parts of x and of weight's columns

The bits are those of `uso_kernels.matmul.linear`, whose functions compute wherever a call is more than one product of one
sequence. Otherwise a call is that product and nothing else: no check, no view, no search for what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.cpu import widens
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows, floats

from .linear import activated_product, activates_in_product, columns_of, linear, linear_of_parts


class Product:
    """y = x W^T + b of one packed matrix.

    Args:
        weight: [N, K], rows may be strided.
        bias: [N], or None.
        sequences: as for `uso_kernels.matmul.linear.linear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sequences: Ragged | None) -> None:
        self._weight, self._bias, self._sequences = weight, bias, sequences
        self._transposed = weight.t()
        self._is_one = _is_one(weight, sequences)
        self._activates = self._is_one and bias is not None and activates_in_product(weight)

    def __call__(self, x: Rows, *, out: Tensor | None = None) -> Tensor:
        """Multiply floats [M, K], into `out` where it is given; [M, N]."""
        x = floats(x)
        if not self._is_one:
            return linear(x, self._weight, self._bias, self._sequences, out=out)
        if out is None:
            return F.linear(x, self._weight, self._bias)
        if self._bias is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(self._bias, x, self._transposed, out=out)

    def activated(self, x: Rows) -> Tensor:
        """Multiply floats [M, K] and activate by GELU; [M, N]."""
        x = floats(x)
        if not self._activates:
            return linear(x, self._weight, self._bias, self._sequences, gelu=True)
        assert self._bias is not None
        return activated_product(x, self._weight, self._bias)


class ProductOfParts:
    """y = sum of x_i W_i^T + b, of a matrix whose columns lie in several tensors.

    Args:
        weight: [N, K].
        bias: [N], or None.
        widths: columns of each part; K together.
        sequences: as for `uso_kernels.matmul.linear.linear_of_parts`.

    Raises:
        ValueError: the widths are not K together.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, widths: Sequence[int], sequences: Ragged | None) -> None:
        self._columns = [columns.t() for columns in columns_of(weight, widths)]
        self._weight, self._bias, self._sequences = weight, bias, sequences
        self._is_one = bias is not None and _is_one(weight, sequences)

    def __call__(self, *parts: Tensor) -> Tensor:
        """Multiply [M, K_i] each; [M, N]."""
        if not self._is_one:
            return linear_of_parts(parts, self._weight, self._bias, self._sequences)
        assert self._bias is not None
        y = torch.addmm(self._bias, parts[0], self._columns[0])
        for x, columns in zip(parts[1:], self._columns[1:], strict=True):
            torch.addmm(y, x, columns, out=y)
        return y


def _is_one(weight: Tensor, sequences: Ragged | None) -> bool:
    """Whether a call is one product, of which autograd records nothing."""
    return (sequences is None or len(sequences) == 1) and not torch.is_grad_enabled() and not widens(weight)
