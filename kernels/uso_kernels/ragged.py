"""Where each sequence lies in a packed tensor.

Packed tensors are ``[T, ...]``: sequences laid end to end, each starting on a multiple of ``TILE_ROWS`` rows, so that a tile of
rows never spans two sequences. The rows between a sequence's true length and the next start are padding: computed, finite, and
read by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

TILE_ROWS = 16


def round_up_to_tile(rows: int) -> int:
    """Round a number of rows up to a whole number of tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


@dataclass(frozen=True)
class Ragged:
    """Starts and true lengths of the S sequences of a packed tensor, on the host and on the device.

    The host tuples let Python loop without asking the device; the tensors are what kernels read.

    Args:
        starts: row of each sequence's first token, multiples of ``TILE_ROWS``.
        lengths: true tokens of each sequence, at least 1.
        rows: rows of the packed tensor, a multiple of ``TILE_ROWS``.
        bounds_tensor: int32 [S + 1], the starts, then the number of rows.
        lengths_tensor: int32 [S].
        tile_sequence: int32 [rows / TILE_ROWS], the sequence that each tile of rows belongs to.
        token_rows: int64 [sum of lengths], the rows that hold tokens; None where all do.
        token_bounds_tensor: int32 [S + 1], running sums of the lengths: where sequences lie once padding rows are left out.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: int
    bounds_tensor: Tensor
    lengths_tensor: Tensor
    tile_sequence: Tensor
    token_rows: Tensor | None
    token_bounds_tensor: Tensor
    _spans: dict[tuple[int, int], Ragged] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def pack(lengths: Sequence[int], device: torch.device | str = "cpu", *, capacities: Sequence[int] | None = None) -> Ragged:
        """Lay sequences end to end on tile boundaries.

        Args:
            lengths: true tokens of each sequence.
            device: where the tensors go.
            capacities: rows reserved for each sequence, multiples of ``TILE_ROWS``; by default its length rounded up.

        Raises:
            ValueError: no sequence, an empty one, or a capacity that is too small or not a multiple of the tile.
        """
        if not lengths:
            raise ValueError("a packed batch needs at least one sequence, got none")
        sizes = [round_up_to_tile(n) for n in lengths] if capacities is None else list(capacities)
        if len(sizes) != len(lengths):
            raise ValueError(f"expected one capacity per sequence ({len(lengths)}), got {len(sizes)}")
        for i, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            if length < 1:
                raise ValueError(f"sequence {i} must hold at least one token, got {length}")
            if size < length or size % TILE_ROWS:
                raise ValueError(f"sequence {i}: capacity {size} must be a multiple of {TILE_ROWS} and at least {length}")
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        bounds = list(accumulate(lengths, initial=0))
        token_rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=False)])
        tiles = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes) // TILE_ROWS)
        return Ragged(
            starts=tuple(starts[:-1]),
            lengths=tuple(lengths),
            rows=starts[-1],
            bounds_tensor=torch.tensor(starts, dtype=torch.int32).to(device),
            lengths_tensor=torch.tensor(list(lengths), dtype=torch.int32).to(device),
            tile_sequence=tiles.to(torch.int32).to(device),
            token_rows=None if len(token_rows) == starts[-1] else token_rows.to(device),
            token_bounds_tensor=torch.tensor(bounds, dtype=torch.int32).to(device),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def max_capacity(self) -> int:
        """Rows of the longest sequence with its padding."""
        return max(end - start for start, end in pairwise((*self.starts, self.rows)))

    @property
    def has_padding(self) -> bool:
        """Whether any row belongs to no token."""
        return sum(self.lengths) != self.rows

    @cached_property
    def row_slices(self) -> tuple[slice, ...]:
        """The rows of each sequence, with its padding."""
        return tuple(slice(start, end) for start, end in pairwise((*self.starts, self.rows)))

    def end(self, index: int) -> int:
        """The row after one sequence's last padding row."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.rows

    def span(self, index: int) -> slice:
        """The rows of one sequence's true tokens."""
        return slice(self.starts[index], self.starts[index] + self.lengths[index])

    def neighbours(self, first: int, stop: int) -> Ragged:
        """Some sequences side by side as a layout of their own, made once; it begins at row ``starts[first]``."""
        found = self._spans.get((first, stop))
        if found is None:
            capacities = [self.end(i) - self.starts[i] for i in range(first, stop)]
            device = self.bounds_tensor.device
            found = self._spans[first, stop] = Ragged.pack(self.lengths[first:stop], device, capacities=capacities)
        return found
