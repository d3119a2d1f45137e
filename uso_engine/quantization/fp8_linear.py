"""A matrix in float8 e4m3 with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_engine.model.activation import QuantizedRows
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.scaled_matmul import scaled_matmul

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

    def forward(self, x: Tensor | QuantizedRows, outputs: slice = slice(None)) -> Tensor:
        lead: tuple[int, ...]
        if isinstance(x, Tensor):
            lead, dtype = x.shape[:-1], x.dtype
            rows = QuantizedRows(*quantize_rows(x.reshape(-1, self.in_features), FP8))
        else:
            rows, lead, dtype = x, x.values.shape[:-1], self.dtype
        y = scaled_matmul(*rows, self.values[outputs], self.scale[outputs], self._bias(outputs), dtype=dtype)
        return y.view(*lead, -1)


class Fp8WeightLinear(Fp8Linear):
    """Weight-only: the weight is turned back into x's type in scratch memory; activations keep theirs."""

    quantized_input = None

    def forward(self, x: Tensor | QuantizedRows, outputs: slice = slice(None)) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("a weight-only layer takes activations as floats")
        weight = self.values[outputs].to(x.dtype) * self.scale[outputs, None].to(x.dtype)
        return F.linear(x, weight, self._bias(outputs))
