"""A matrix with an optional bias: the one kind of layer that quantised classes replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from uso_kernels.matmul.linear import linear, linear_of_parts
from uso_kernels.matmul.product import Product, ProductOfParts
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows, floats

from .hooks import is_hooked


class Projection(Protocol):
    """A layer at one place of a step: called with the arguments that change from call to call."""

    def __call__(self, x: Rows, *, out: Tensor | None = None) -> Tensor:
        """Apply the layer."""

    def activated(self, x: Rows) -> Tensor:
        """Apply the layer and GELU."""


class LayerCall:
    """A `Projection` that calls the module: for kinds that prepare nothing, and layers that somebody hooks into.

    `activated` calls no hooks; whoever uses it looks first (`is_hooked`).

    Args:
        layer: a `Linear`, or what has replaced one.
        sequences: what `Linear.forward` is called with.
        outputs: likewise.
    """

    def __init__(self, layer: nn.Module, sequences: Ragged | None, outputs: slice) -> None:
        self._layer, self._sequences, self._outputs = layer, sequences, outputs

    def __call__(self, x: Rows, *, out: Tensor | None = None) -> Tensor:
        """Apply the layer."""
        result: Tensor = self._layer(x, self._sequences, self._outputs, out=out)
        return result

    def activated(self, x: Rows) -> Tensor:
        """Apply the layer and GELU."""
        result: Tensor = self._layer.activated(x, self._sequences, self._outputs)  # type: ignore[operator]
        return result


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

        Raises:
            TypeError: rows in 8 bits.
        """
        return linear(floats(x), self.weight[outputs], self._bias(outputs), sequences, out=out)

    def activated(self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None)) -> Tensor:
        """Apply the layer and GELU; arguments as for `forward`. Only where the layer takes floats."""
        return linear(floats(x), self.weight[outputs], self._bias(outputs), sequences, gelu=True)

    def of_parts(self, parts: Sequence[Tensor], sequences: Ragged | None = None) -> Tensor:
        """Apply the layer to columns that lie in several tensors, see `uso_kernels.matmul.linear`. Only for floats."""
        return linear_of_parts(parts, self.weight, self.bias, sequences)

    def prepare(self, sequences: Ragged | None, outputs: slice = slice(None)) -> Projection:
        """The layer at one place of a step, where `forward` and `activated` are called with these arguments each time.

        It stands for the weight as it is now; whoever keeps it sees to that (`uso_engine.model.run.Layers`).
        """
        if is_hooked(self):
            return LayerCall(self, sequences, outputs)
        return Product(self.weight[outputs], self._bias(outputs), sequences)

    def prepare_parts(self, widths: Sequence[int], sequences: Ragged | None) -> Callable[..., Tensor]:
        """`of_parts` at one place of a step, for parts of so many columns."""
        return ProductOfParts(self.weight, self.bias, widths, sequences)

    def _bias(self, outputs: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[outputs]
