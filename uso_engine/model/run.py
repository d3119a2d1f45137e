"""What every block of one evaluation shares: the batch, and the ways to compute that can be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from uso_kernels.attention import attention
from uso_kernels.ragged import Ragged

from .packing import PackedBatch


@dataclass(frozen=True)
class Fusion:
    """Which passes over the data a step does without; each can be switched off, to be measured.

    Args:
        gelu: activate inside the product, where the next one reads floats, and not in a pass of its own.
        parts: multiply a single block's matrices by their parts, where they take floats: attention's result and the MLP's
            hidden layer each where they are, and the second product adds to the first.
        values: let attention read values where the projection wrote them, where those rows are in joint order.
    """

    gelu: bool = True
    parts: bool = True
    values: bool = True


ALL_FUSED = Fusion()


class Exchange(Protocol):
    """Attention where other processes have the batch's other rows; `uso_engine.parallel.exchange` is the real one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, backend: str, out: Tensor | None) -> Tensor:
        """As `Run.attend`."""


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Args:
        batch: the sequences.
        attention: a backend of `uso_kernels.attention`, or "auto".
        fusion: which passes over the data are left out.
        exchange: how attention reaches the rows that other processes have; None where all rows are here.
    """

    batch: PackedBatch
    attention: str = "auto"
    fusion: Fusion = ALL_FUSED
    exchange: Exchange | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, out: Tensor | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            q: [T_q, H, D].
            k: [T, H, D] in joint order.
            v: [T, H, D].
            queries: where q's rows lie: the batch's joint or output layout.
            out: [T_q, H, D], where the result goes.

        Returns:
            [T_q, H, D].
        """
        if self.exchange is not None:
            return self.exchange.attend(q, k, v, queries, self.attention, out)
        return attention(q, k, v, queries, self.batch.joint, backend=self.attention, out=out)
