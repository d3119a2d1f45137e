"""A matrix with an optional bias: the one kind of layer that quantised classes replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uso_kernels.linear import linear
from uso_kernels.ragged import Ragged
from uso_kernels.scratch import Scratch, new_memory


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: columns K of the weight.
        out_features: rows N of the weight.
        bias: whether there is a bias.
        device: usually ``meta``; the loader brings the values.
        dtype: of weight and bias.
    """

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
        self,
        x: Tensor,
        outputs: slice = slice(None),
        *,
        sequences: Ragged | None = None,
        out: Tensor | None = None,
        scratch: Scratch = new_memory,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features], the weight's dtype.
            outputs: which output columns to compute; all by default.
            sequences: where the sequences of a packed x lie: each is then a product of its own, so that its bits do not change
                with its company (see `uso_kernels.linear`). None where x is no packed batch.
            out: [M, selected out_features], where the result goes, but under autograd; x is then [M, in_features].
            scratch: lends memory to the quantised layers that need some; this one needs none.

        Returns:
            [..., selected out_features].
        """
        bias = None if self.bias is None else self.bias[outputs]
        return linear(x, self.weight[outputs], bias, sequences=sequences, out=out)
