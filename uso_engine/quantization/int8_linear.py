"""A matrix in int8 with one scale per row, values chosen by optimum-quanto."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_engine.model.activation import QuantizedRows
from uso_kernels.int8_matmul import int8_matmul
from uso_kernels.linear import linear
from uso_kernels.ragged import Ragged
from uso_kernels.scratch import Scratch, new_memory

from . import quanto_values
from .quantized_linear import QuantizedLinear, TensorLayout


class Int8Linear(QuantizedLinear):
    """W8A8: activations are quantised per row, the product runs on int8 tensor cores; on a CPU in exact integers too."""

    quantized_input: torch.dtype | None = torch.int8
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
        self,
        x: Tensor | QuantizedRows,
        outputs: slice = slice(None),
        *,
        sequences: Ragged | None = None,
        out: Tensor | None = None,
        scratch: Scratch = new_memory,
    ) -> Tensor:
        # Sums of integers are exact: no row depends on the rows beside it, so all sequences are one product.
        rows, dtype = self._rows(x, torch.int8, scratch)
        y = int8_matmul(*rows, self.values[outputs], self.scale[outputs], self._bias(outputs), dtype=dtype, out=out)
        return y.view(*x.shape[:-1], -1) if isinstance(x, Tensor) else y


class Int8WeightLinear(Int8Linear):
    """Weight-only: the weight is turned back into x's type in scratch memory; activations keep theirs.

    An ordinary product of x's type, never ``torch._weight_int8pack_mm``: on a CPU that crashes the process when the int8 values
    do not lie at a multiple of 16 bytes, which values mapped from a file may not.
    """

    quantized_input = None

    def forward(
        self,
        x: Tensor | QuantizedRows,
        outputs: slice = slice(None),
        *,
        sequences: Ragged | None = None,
        out: Tensor | None = None,
        scratch: Scratch = new_memory,
    ) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("a weight-only layer takes activations as floats")
        values = self.values[outputs]
        weight = scratch("weight", values.shape, x)
        # One pass: the product is formed in float32 and rounded once when it is written.
        torch.mul(values, self.scale[outputs, None], out=weight)
        return linear(x, weight, self._bias(outputs), sequences=sequences, out=out)
