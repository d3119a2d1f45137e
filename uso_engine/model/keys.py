"""What attention reads of rows that stand for several: their keys and values as often as they stand for somebody.

Text rows have no position, so n equal ones have one key and one value n times, and one answer. A sequence may keep one of them:
products, queries and everything else then see one row, and attention sees n keys, which are copied behind the sequence's own.
Against one key with ln n added to its scores that is n - 1 keys more, but every attention backend can do it as it is, and at
the speed that it has without a bias.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
from torch import Tensor

from uso_kernels.ragged import Ragged

Merged = tuple[tuple[int, int], ...]
"""The rows of a sequence that stand for several, with their number: (text row, how many), rising, each at least 2."""


def copies_of(merged: Merged) -> int:
    """Keys that a sequence has beyond its rows."""
    return sum(count - 1 for _, count in merged)


@dataclass(frozen=True)
class Keys:
    """Where attention's keys and values lie.

    Args:
        layout: of the packed keys; each sequence's rows in joint order, then copies.
        sources: int64 [T_k], the joint row of each; None: the joint order as it is.
    """

    layout: Ragged
    sources: Tensor | None = None

    @staticmethod
    def of(joint: Ragged, merged: Sequences[Merged]) -> Keys:
        """The keys of a batch.

        Args:
            joint: its joint order.
            merged: of each sequence.
        """
        if not any(merged):
            return Keys(joint)
        lengths = [length + copies_of(rows) for length, rows in zip(joint.lengths, merged, strict=True)]
        device = joint.tile_sequence.device
        layout = Ragged.pack(lengths, device)
        sources = torch.empty(layout.rows, dtype=torch.int64)
        for i, rows in enumerate(merged):
            own = torch.arange(joint.starts[i], joint.starts[i] + joint.lengths[i])
            copies = [torch.full((count - 1,), joint.starts[i] + row) for row, count in rows]
            sources[layout.row_slices[i]] = joint.starts[i]  # Padding rows: read by nobody.
            sources[layout.span(i)] = torch.cat((own, *copies))
        return Keys(layout, sources.to(device))

    def take(self, joint: Tensor) -> Tensor:
        """Keys or values [T_k, H, D] of those in joint order [T, H, D]."""
        return joint if self.sources is None else joint.index_select(0, self.sources)
