"""What the quantised replacements of `uso_engine.model.linear.Linear` have in common."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from uso_engine.model.linear import LayerCall, Projection
from uso_kernels.matmul.linear import linear, linear_of_parts
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged
from uso_kernels.rows import QuantizedRows, Rows, floats


class TensorLayout(NamedTuple):
    """Shape and type of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class QuantizedLinear(nn.Module, abc.ABC):
    """y = x W^T + b with W kept in few bits.

    Args:
        in_features: columns K of the weight.
        out_features: rows N of the weight.
        bias: whether there is a bias.
        dtype: of the bias and the results.
        device: usually ``meta``; `assign` brings the values.
    """

    takes: torch.dtype | None = None
    """The 8-bit type of the rows that it multiplies, which floats are brought to; None: floats only."""

    restores_weight: ClassVar[bool] = False
    """Whether all of the weight is turned back into floating point for a product, which takes memory for as long."""

    column_multiple: ClassVar[int] = 16
    """K and N must be multiples of it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        # Callers of transformers' text encoders look at the type of `weight` to convert activations; None says: leave them.
        self.weight = None
        for name, layout in self.layout(in_features, out_features).items():
            self.register_buffer(name, torch.empty(layout.shape, dtype=layout.dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.bias: Tensor | None

    @classmethod
    @abc.abstractmethod
    def layout(cls, in_features: int, out_features: int) -> dict[str, TensorLayout]:
        """The tensors that hold a weight of [out_features, in_features], by name, without the bias."""

    @classmethod
    @abc.abstractmethod
    def quantize_weight(cls, weight: Tensor) -> dict[str, Tensor]:
        """Choose the values for a finite float32 weight [N, K]; the result follows `layout`."""

    @abc.abstractmethod
    def forward(
        self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None), *, out: Tensor | None = None
    ) -> Tensor:
        """Apply the layer, as `uso_engine.model.linear.Linear.forward` does."""

    def prepare(self, sequences: Ragged | None, outputs: slice = slice(None)) -> Projection:
        """The layer at one place of a step, as `uso_engine.model.linear.Linear.prepare`."""
        return LayerCall(self, sequences, outputs)

    def dequantized_weight(self) -> Tensor:
        """The weight that the stored values stand for, float32 [N, K]."""
        raise NotImplementedError

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over values, ``bias`` among them where there is one.

        Raises:
            ValueError: a tensor is missing, left over, or of another shape or type; the message lists all of them.
        """
        expected = self.layout(self.in_features, self.out_features)
        if self.bias is not None:
            expected["bias"] = TensorLayout((self.out_features,), self.dtype)
        problems = [f"{name} is missing" for name in expected if name not in tensors]
        problems += [f"{name} is left over" for name in tensors if name not in expected]
        for name, layout in expected.items():
            if name in tensors and (tuple(tensors[name].shape), tensors[name].dtype) != layout:
                got = tensors[name]
                problems.append(f"{name} must be {layout.dtype} {list(layout.shape)}, got {got.dtype} {list(got.shape)}")
        if problems:
            raise ValueError("; ".join(problems))
        for name in expected:
            setattr(self, name, tensors[name])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _rows(self, x: Rows, dtype: torch.dtype) -> tuple[QuantizedRows, torch.dtype]:
        """What an 8-bit product multiplies, [M, in_features], and the type of its result."""
        if isinstance(x, Tensor):
            return quantize_rows(x.reshape(-1, self.in_features), dtype), x.dtype
        return x, self.dtype

    def _bias(self, outputs: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[outputs]


class WeightOnlyLinear(QuantizedLinear):
    """A layer that turns its weight back into its activations' type for each product; activations keep theirs."""

    takes: torch.dtype | None = None
    restores_weight = True

    @abc.abstractmethod
    def weight_like(self, x: Tensor, outputs: slice) -> Tensor:
        """The weight of some output columns, [N, K] in x's type."""

    def forward(
        self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None), *, out: Tensor | None = None
    ) -> Tensor:
        x = floats(x)
        return linear(x, self.weight_like(x, outputs), self._bias(outputs), sequences, out=out)

    def activated(self, x: Rows, sequences: Ragged | None = None, outputs: slice = slice(None)) -> Tensor:
        """Apply the layer and GELU, as `uso_engine.model.linear.Linear.activated` does."""
        x = floats(x)
        return linear(x, self.weight_like(x, outputs), self._bias(outputs), sequences, gelu=True)

    def of_parts(self, parts: Sequence[Tensor], sequences: Ragged | None = None) -> Tensor:
        """Apply the layer to columns in several tensors, as `uso_engine.model.linear.Linear.of_parts` does."""
        return linear_of_parts(parts, self.weight_like(parts[0], slice(None)), self.bias, sequences)

    def prepare_parts(self, widths: Sequence[int], sequences: Ragged | None) -> Callable[..., Tensor]:
        """`of_parts` at one place of a step, as `uso_engine.model.linear.Linear.prepare_parts`."""
        return lambda *parts: self.of_parts(parts, sequences)
