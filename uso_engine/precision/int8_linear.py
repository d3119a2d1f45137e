"""A matrix in int8 with one scale per row, values chosen by optimum-quanto."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.matmul.int8 import int8_matmul
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from . import quanto_values
from .quantized_linear import QuantizedLinear, TensorLayout, WeightOnlyLinear


class Int8Linear(QuantizedLinear):
    """W8A8: activations are quantised per row, the product runs on int8 tensor cores; on a CPU in exact integers too."""

    takes: torch.dtype | None = torch.int8
    values: Tensor
    scale: Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> dict[str, TensorLayout]:
        return {
            "values": TensorLayout((out_features, in_features), torch.int8),
            "scale": TensorLayout((out_features,), torch.float32),
        }

    @classmethod
    def quantize_weight(cls, weight: Tensor) -> dict[str, Tensor]:
        values, scale = quanto_values.int8_values(weight)
        return {"values": values, "scale": scale}

    def dequantized_weight(self) -> Tensor:
        return self.values.float() * self.scale[:, None]

    def forward(
        self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None), *, out: Tensor | None = None
    ) -> Tensor:
        # Sums of integers are exact: no row depends on the rows beside it, so all sequences are one product.
        rows, dtype = self._rows(x, torch.int8)
        y = int8_matmul(*rows, self.values[outputs], self.scale[outputs], self._bias(outputs), dtype=dtype, out=out)
        return y.view(*x.shape[:-1], -1) if isinstance(x, Tensor) else y


class Int8WeightLinear(WeightOnlyLinear, Int8Linear):
    """Weight-only: the weight is turned back into x's type for each product; activations keep theirs.

    An ordinary product of x's type, never ``torch._weight_int8pack_mm``: on a CPU that crashes the process when the int8 values
    do not lie at a multiple of 16 bytes, which values mapped from a file may not.
    """

    def weight_like(self, x: Tensor, outputs: slice) -> Tensor:
        values = self.values[outputs]
        # One pass: the product is formed in float32 and rounded once when it is written.
        return torch.mul(values, self.scale[outputs, None], out=x.new_empty(values.shape))
