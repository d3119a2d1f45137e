"""Changes that are made of the weight itself: IA3's factors, OFT's rotations, GLoRA's products.

Each turns a weight W into W'; what is merged is s * (W' - W) at strength s, computed from the pristine W, so that several files
do not depend on their order.
Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"; Qiu et al.,
"Controlling Text-to-Image Diffusion by Orthogonal Finetuning"; LyCORIS, lycoris/modules/{ia3,diag_oft,glora}.py; PEFT's IA3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .update import content_digest


class WeightTransform(Protocol):
    """What one layer's weight becomes."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it depends on, as stored."""
        ...

    def change(self, weight: Tensor) -> Tensor:
        """W' - W.

        Args:
            weight: W, float32 [rows, columns], the layer's rows in the file's order; it is not changed.
        """
        ...


@dataclass(frozen=True, eq=False)
class ScaledWeight:
    """IA3: W' = W * factors.

    Args:
        factors: [rows, 1] or [1, columns], as stored: a change where 0 leaves the weight, or a factor where 1 does.
        neutral: which of the two, 0 or 1.
    """

    factors: Tensor
    neutral: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.factors, torch.tensor(self.neutral))

    def change(self, weight: Tensor) -> Tensor:
        return weight * (self.factors.to(weight.device, torch.float32) - self.neutral)


@dataclass(frozen=True, eq=False)
class RotatedWeight:
    """OFT: every n rows are turned by an orthogonal matrix: W'_k = R_kᵀ W_k, then every row may be scaled.

    R = (1 + Q)(1 - Q)⁻¹ (Cayley) with Q = B - Bᵀ, so any blocks B give rotations.

    Args:
        blocks: B, [rows / n, n, n].
        bound: Q is shortened to this Frobenius norm, taken over all blocks together, where it is longer; 0 for none.
        rescale: [rows, 1], if there is one.
    """

    blocks: Tensor
    bound: float = 0.0
    rescale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        rest = () if self.rescale is None else (self.rescale,)
        return (self.blocks, torch.tensor(self.bound), *rest)

    def change(self, weight: Tensor) -> Tensor:
        blocks = self.blocks.to(weight.device, torch.float32)
        skew = blocks - blocks.mT
        length = torch.linalg.vector_norm(skew)
        if 0 < self.bound < length:
            skew = skew * (self.bound / length)
        one = torch.eye(blocks.shape[-1], device=weight.device)
        # Rᵀ = (1 - Qᵀ)⁻¹ (1 + Qᵀ) = (1 + Q)⁻¹ (1 - Q).
        turned = torch.linalg.solve(one + skew, one - skew) @ weight.unflatten(0, blocks.shape[:2])
        turned = turned.flatten(0, 1)
        if self.rescale is not None:
            turned *= self.rescale.to(weight.device, torch.float32)
        return turned.sub_(weight)


@dataclass(frozen=True, eq=False)
class GeneralLowRank:
    """GLoRA: W' = W + scale * (W @ a_up @ a_down + b_up @ b_down).

    Args:
        a_up: [columns, r].
        a_down: [r, columns].
        b_up: [rows, r].
        b_down: [r, columns].
        scale: alpha / r.
    """

    a_up: Tensor
    a_down: Tensor
    b_up: Tensor
    b_down: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a_up, self.a_down, self.b_up, self.b_down, torch.tensor(self.scale))

    def change(self, weight: Tensor) -> Tensor:
        a_up, a_down, b_up, b_down = (tensor.to(weight.device, torch.float32) for tensor in self.tensors[:4])
        return (weight @ a_up @ a_down).addmm_(b_up, b_down).mul_(self.scale)


@dataclass(frozen=True, eq=False)
class TransformUpdate:
    """A transform of one layer, added to consecutive rows of one weight.

    Args:
        transform: of the layer.
        shape: rows and columns of the layer.
        row_start: first row of the weight that changes.
        order: which of the layer's rows comes to each row of the block, in pieces; in the layer's own order if not given.
    """

    transform: WeightTransform
    shape: tuple[int, int]
    row_start: int = 0
    order: tuple[range, ...] = ()

    scale: float = 1.0

    @property
    def rows(self) -> range:
        return range(self.row_start, self.row_start + self.shape[0])

    @property
    def columns(self) -> range:
        return range(self.shape[1])

    @property
    def needs_pristine(self) -> bool:
        return True

    @cached_property
    def digest(self) -> bytes:
        return content_digest(self.transform.tensors, (type(self.transform).__name__, self.row_start, self.order))

    def add_to(self, weight: Tensor, strength: float, pristine: Tensor | None = None) -> None:
        if pristine is None:
            raise ValueError("this change depends on the pristine weight, which was not given")
        block = weight[self.rows.start : self.rows.stop]
        original = pristine[self.rows.start : self.rows.stop].to(torch.float32)
        if len(self.order) < 2:
            block.add_(self.transform.change(original), alpha=strength)
            return
        places = torch.cat([torch.arange(piece.start, piece.stop, device=weight.device) for piece in self.order])
        in_file = torch.empty_like(original)
        in_file[places] = original
        block.add_(self.transform.change(in_file)[places], alpha=strength)
