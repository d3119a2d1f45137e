"""A matrix in 4 bits, in groups of 128 columns with a scale and a shift each, values chosen by optimum-quanto."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.matmul.int4 import int4_dequantize, pack_int4

from . import quanto_values
from .quantized_linear import TensorLayout, WeightOnlyLinear

GROUP = 128


def group_size(in_features: int) -> int:
    """Columns of a group: 128, or less for widths that are no multiple of it (small models only).

    Raises:
        ValueError: not a multiple of 16.
    """
    for size in (GROUP, 64, 32, 16):
        if in_features % size == 0:
            return size
    raise ValueError(f"int4 needs a width that is a multiple of 16, got {in_features}")


class Int4Linear(WeightOnlyLinear):
    """Weight-only: our kernel turns the weight back into x's type for each product; activations keep theirs."""

    packed: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> dict[str, TensorLayout]:
        groups = in_features // group_size(in_features)
        return {
            "packed": TensorLayout((out_features, in_features // 2), torch.uint8),
            "scale": TensorLayout((out_features, groups), torch.float16),
            "shift": TensorLayout((out_features, groups), torch.float16),
        }

    @classmethod
    def quantize_weight(cls, weight: Tensor) -> dict[str, Tensor]:
        size = group_size(weight.shape[1])
        codes, scale, shift = quanto_values.int4_values(weight, size)
        return {"packed": pack_int4(codes, size), "scale": scale, "shift": shift}

    def dequantized_weight(self) -> Tensor:
        return int4_dequantize(self.packed, self.scale, self.shift, dtype=torch.float32)

    def weight_like(self, x: Tensor, outputs: slice) -> Tensor:
        return int4_dequantize(self.packed[outputs], self.scale[outputs], self.shift[outputs], dtype=x.dtype)
