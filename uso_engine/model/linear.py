"""A matrix with an optional bias: the one kind of layer that quantised classes replace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uso_kernels.matmul.linear import linear, linear_of_parts
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: columns K of the weight.
        out_features: rows N of the weight.
        bias: whether there is a bias.
        device: usually ``meta``; the loader brings the values.
        dtype: of weight and bias.
    """

    takes: torch.dtype | None = None
    """The 8-bit type of the rows that it multiplies; None: floats."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        # Values come from a checkpoint; drawing random ones for 12 billion parameters would cost minutes.
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        return self.weight.dtype

    def forward(
        self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None), *, out: Tensor | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features], of what the layer takes; floats are the weight's dtype.
            sequences: where the sequences of a packed x lie: each is then a product of its own, so that its bits do not change
                with its company (see `uso_kernels.matmul.linear`). None where x is no packed batch.
            outputs: which output columns to compute; all by default.
            out: where the result goes, in this layer's dtype.

        Returns:
            [..., selected out_features].
        """
        assert isinstance(x, Tensor)
        return linear(x, self.weight[outputs], self._bias(outputs), sequences, out=out)

    def activated(self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None)) -> Tensor:
        """Apply the layer and GELU; arguments as for `forward`. Only where the layer takes floats."""
        assert isinstance(x, Tensor)
        return linear(x, self.weight[outputs], self._bias(outputs), sequences, gelu=True)

    def of_parts(self, parts: Sequence[Tensor], sequences: Ragged | None = None) -> Tensor:
        """Apply the layer to columns that lie in several tensors, see `uso_kernels.matmul.linear`. Only for floats."""
        return linear_of_parts(parts, self.weight, self.bias, sequences)

    def _bias(self, outputs: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[outputs]
