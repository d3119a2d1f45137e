"""The change of one layer as each kind of adapter stores it: factors that are multiplied when the change is merged.

Low-rank: up @ down. LoKr: w1 ⊗ w2, the Kronecker product, whose factors may be low-rank products themselves. LoHa:
(w1_a @ w1_b) * (w2_a @ w2_b), element by element. A difference is the change itself. All are computed in float32.
Source: LyCORIS, lycoris/modules/lokr.py and loha.py; PEFT's tuners of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Product(Protocol):
    """The factors of one layer's change."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, as stored."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the change."""
        ...

    def dense(self, device: torch.device) -> Tensor:
        """The change itself: float32 [rows, columns], without any scale, of the caller's own."""
        ...


@dataclass(frozen=True, eq=False)
class LowRankProduct:
    """up @ down.

    Args:
        down: [r, columns].
        up: [rows, r].
    """

    down: Tensor
    up: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up)

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return self.up.to(device, torch.float32) @ self.down.to(device, torch.float32)


@dataclass(frozen=True, eq=False)
class KroneckerProduct:
    """w1 ⊗ w2, each one matrix, or two that are multiplied first.

    Args:
        first: (w1,) or (w1_a, w1_b).
        second: (w2,) or (w2_a, w2_b).
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.first, *self.second)

    @property
    def shape(self) -> tuple[int, int]:
        return (
            self.first[0].shape[0] * self.second[0].shape[0],
            self.first[-1].shape[1] * self.second[-1].shape[1],
        )

    def dense(self, device: torch.device) -> Tensor:
        return torch.kron(_multiplied(self.first, device), _multiplied(self.second, device))


@dataclass(frozen=True, eq=False)
class HadamardProduct:
    """(w1_a @ w1_b) * (w2_a @ w2_b).

    Args:
        first: (w1_a, w1_b), [rows, r] and [r, columns].
        second: (w2_a, w2_b), of the same shapes but perhaps another r.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.first, *self.second)

    @property
    def shape(self) -> tuple[int, int]:
        return self.first[0].shape[0], self.first[1].shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return _multiplied(self.first, device).mul_(_multiplied(self.second, device))


@dataclass(frozen=True, eq=False)
class Difference:
    """The change itself.

    Args:
        values: [rows, columns]; one column for a bias or a norm's scale.
    """

    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return self.values.to(device, torch.float32, copy=True)


def _multiplied(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    first, *rest = (factor.to(device, torch.float32) for factor in factors)
    return first @ rest[0] if rest else first
