"""A LoRA once its file has been understood: low-rank products to be added to rows of the model's matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """scale * up @ down, added to a block of one weight.

    Args:
        down: [r, columns], as stored.
        up: [rows, r], as stored.
        scale: alpha / rank, or what the file says in its place.
        row_start: first row of the weight that it is added to.
        column_start: first column of the weight that it is added to.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    row_start: int = 0
    column_start: int = 0

    @property
    def rows(self) -> range:
        """Rows of the weight that change."""
        return range(self.row_start, self.row_start + self.up.shape[0])

    @property
    def columns(self) -> range:
        """Columns of the weight that change."""
        return range(self.column_start, self.column_start + self.down.shape[1])

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add strength * scale * up @ down to a float32 weight in place, in float32, on the weight's device.

        Args:
            weight: [N, K], at least as large as the block.
            strength: the user's factor.
        """
        block = weight[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]
        up = self.up.to(weight.device, torch.float32)
        down = self.down.to(weight.device, torch.float32)
        block.addmm_(up, down, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class LoRA:
    """One LoRA file.

    Args:
        name: what messages call it, usually its path.
        style: the key style that it was written in.
        updates: by canonical weight key, in the order in which they are added.
        skipped_keys: how many keys of text encoders were left out.
    """

    name: str
    style: str
    updates: Mapping[str, tuple[LowRankUpdate, ...]]
    skipped_keys: int = 0


LoRASet = Sequence[tuple[LoRA, float]]
"""LoRAs with the user's factors; they are added in this order, in float32, and only the sum is rounded."""
