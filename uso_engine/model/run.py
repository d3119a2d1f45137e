"""What every block of one evaluation shares: the batch, and the ways to compute that can be chosen."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Args:
        batch: the sequences.
        attention: a backend of `uso_kernels.attention`, or "auto".
        fusion: which passes over the data are left out.
    """

    batch: PackedBatch
    attention: str = "auto"
    fusion: Fusion = ALL_FUSED
