"""A matrix in float8 e4m3 with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_engine.model.activation import QuantizedRows
from uso_kernels.linear import linear
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged
from uso_kernels.scaled_matmul import scaled_matmul
from uso_kernels.scratch import Scratch, new_memory

from .quantized_linear import QuantizedLinear, TensorLayout

FP8 = torch.float8_e4m3fn


class Fp8Linear(QuantizedLinear):
    """W8A8: activations are quantised per row, the product runs on fp8 tensor cores.

    On a CPU the same quantised values are multiplied in float32, so the error is the tier's.
    """

    quantized_input: torch.dtype | None = FP8
    values: Tensor
    scale: Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> dict[str, TensorLayout]:
        return {
            "values": TensorLayout((out_features, in_features), FP8),
            "scale": TensorLayout((out_features,), torch.float32),
        }

    @classmethod
    def quantize_weight(cls, weight: Tensor) -> dict[str, Tensor]:
        values, scale = quantize_rows(weight, FP8)
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
        rows, dtype = self._rows(x, FP8, scratch)
        values, scale, bias = self.values[outputs], self.scale[outputs], self._bias(outputs)
        y = scaled_matmul(*rows, values, scale, bias, dtype=dtype, sequences=sequences, out=out)
        return y.view(*x.shape[:-1], -1) if isinstance(x, Tensor) else y


class Fp8WeightLinear(Fp8Linear):
    """Weight-only: the weight is turned back into x's type in scratch memory; activations keep theirs."""

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
        values, scale = self.values[outputs], self.scale[outputs]
        weight = scratch("weight", values.shape, x).copy_(values)
        weight.mul_(scratch("weight_scale", scale.shape, x).copy_(scale)[:, None])
        return linear(x, weight, self._bias(outputs), sequences=sequences, out=out)
