"""A matrix in float8 e4m3 with one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.launch import generation_of
from uso_kernels.matmul.fp8 import scaled_matmul
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows, quantize_rows_reference, quantized_dtypes

from .quantized_linear import QuantizedLinear, TensorLayout, WeightOnlyLinear

FP8 = torch.float8_e4m3fn


class Fp8Linear(QuantizedLinear):
    """W8A8: activations are quantised per row, the product runs on fp8 tensor cores.

    On a CPU the same quantised values are multiplied in float32, so the error is the tier's.
    """

    takes: torch.dtype | None = FP8
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
        # Older GPUs, too, keep weights so (`Fp8WeightLinear`), but have no kernel that writes them; this is done once.
        writes = not weight.is_cuda or FP8 in quantized_dtypes(generation_of(weight))
        values, scale = quantize_rows(weight, FP8) if writes else quantize_rows_reference(weight, FP8)
        return {"values": values, "scale": scale}

    def dequantized_weight(self) -> Tensor:
        return self.values.float() * self.scale[:, None]

    def forward(
        self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None), *, out: Tensor | None = None
    ) -> Tensor:
        rows, dtype = self._rows(x, FP8)
        values, scale, bias = self.values[outputs], self.scale[outputs], self._bias(outputs)
        y = scaled_matmul(*rows, values, scale, bias, dtype=dtype, sequences=sequences, out=out)
        return y.view(*x.shape[:-1], -1) if isinstance(x, Tensor) else y


class Fp8WeightLinear(WeightOnlyLinear, Fp8Linear):
    """Weight-only: the weight is turned back into x's type for each product; activations keep theirs."""

    def weight_like(self, x: Tensor, outputs: slice) -> Tensor:
        values, scale = self.values[outputs], self.scale[outputs]
        return values.to(x.dtype).mul_(scale.to(x.dtype)[:, None])
