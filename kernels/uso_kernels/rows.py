"""Rows as one kernel hands them to the next: floats, or 8-bit values with a float32 scale per row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class QuantizedRows(NamedTuple):
    """Values [T, C] in 8 bits and their float32 row scales [T]."""

    values: Tensor
    scale: Tensor


Rows = Tensor | QuantizedRows
