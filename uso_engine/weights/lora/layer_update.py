"""Merging the change of one layer where it is more than a plain low-rank product, DoRA's magnitudes included.

DoRA keeps the direction of (W + change) and learns its length: W' = m * (W + change) / ‖W + change‖, the norm of every row, or
of every column. Its share at strength s is s * (W' - W). W is the pristine weight, so that several files do not depend on their
order.
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation"; LyCORIS, lycoris/modules/base.py; PEFT, tuners/lora/dora.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .products import Product
from .update import content_digest

_SMALLEST_NORM = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """scale * product, or DoRA's change with it, added to consecutive rows of one weight.

    Args:
        product: the layer's change as the file has it.
        scale: alpha / rank, or what the file says in its place.
        row_start: first row of the weight that it is added to.
        order: which row of the product comes to each row of the block, in pieces; in the product's own order if not given.
        magnitude: DoRA's: [rows, 1] in the product's order, or [1, columns].
    """

    product: Product
    scale: float = 1.0
    row_start: int = 0
    order: tuple[range, ...] = ()
    magnitude: Tensor | None = None

    @property
    def rows(self) -> range:
        return range(self.row_start, self.row_start + self.product.shape[0])

    @property
    def columns(self) -> range:
        return range(self.product.shape[1])

    @property
    def needs_pristine(self) -> bool:
        return self.magnitude is not None

    @cached_property
    def digest(self) -> bytes:
        tensors = self.product.tensors if self.magnitude is None else (*self.product.tensors, self.magnitude)
        return content_digest(tensors, (type(self.product).__name__, self.scale, self.row_start, self.order))

    def add_to(self, weight: Tensor, strength: float, pristine: Tensor | None = None) -> None:
        change = self._ordered(self.product.dense(weight.device))
        block = weight[self.rows.start : self.rows.stop]
        if self.magnitude is None:
            block.add_(change, alpha=strength * self.scale)
            return
        if pristine is None:
            raise ValueError("DoRA's change depends on the pristine weight, which was not given")
        original = pristine[self.rows.start : self.rows.stop]
        moved = change.mul_(self.scale).add_(original)
        by_row = self.magnitude.shape[1] == 1 and self.magnitude.shape[0] == moved.shape[0]
        length = torch.linalg.vector_norm(moved, dim=1 if by_row else 0, keepdim=True).clamp_(min=_SMALLEST_NORM)
        magnitude = self.magnitude.to(weight.device, torch.float32)
        moved.mul_((self._ordered(magnitude) if by_row else magnitude) / length).sub_(original)
        block.add_(moved, alpha=strength)

    def _ordered(self, rows: Tensor) -> Tensor:
        return torch.cat([rows[piece.start : piece.stop] for piece in self.order]) if len(self.order) > 1 else rows
