"""What lies between two layers of an autoencoder computed in strips: whole rows, each strip a tensor of its own.

A strip goes as soon as no later strip of the next layer reads it. Planes lie on the device, or in host memory, and then a strip
comes to the device when it is read. Normalisation needs sums over the whole plane: they are taken row by row while strips are
added, in float64, so that they do not depend on how the plane was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uso_engine.errors import MemoryBudgetError

# Elements that are normalised or summed at once, in float32 or float64.
_CHUNK = 1 << 20


@dataclass
class Keeper:
    """Where planes lie.

    Args:
        device: where layers run.
        layout: of every tensor.
        on_host: whether planes wait in host memory, pinned where the device is a GPU.
        moved_bytes: copied between host and device so far, either way.
    """

    device: torch.device
    layout: torch.memory_format
    on_host: bool = False
    moved_bytes: int = field(default=0, init=False)

    def keep(self, rows: Tensor) -> Tensor:
        """Put a strip where planes lie."""
        if not self.on_host:
            return rows
        kept = self._host_memory(rows)
        kept.copy_(rows, non_blocking=True)
        self.moved_bytes += rows.nbytes
        return kept

    def bring(self, kept: Tensor) -> Tensor:
        """A strip on the device."""
        if not self.on_host:
            return kept
        rows = torch.empty(kept.shape, dtype=kept.dtype, device=self.device, memory_format=self.layout)
        rows.copy_(kept, non_blocking=True)
        self.moved_bytes += rows.nbytes
        return rows

    def empty(self, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Device memory for rows [1, channels, height, width]."""
        return torch.empty(1, channels, height, width, dtype=dtype, device=self.device, memory_format=self.layout)

    def _host_memory(self, rows: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        try:
            return torch.empty(rows.shape, dtype=rows.dtype, memory_format=self.layout, pin_memory=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            raise MemoryBudgetError(
                f"no {rows.nbytes / 2**20:.0f} MiB of {kind} for what decoding keeps there: it finds no room on the GPU"
            ) from error


@dataclass(frozen=True)
class _Strip:
    start: int
    stop: int
    rows: Tensor
    # The rows that neighbouring strips read, by number: apart, so that reading one copies one and not the strip.
    edges: dict[int, Tensor]


class Plane:
    """[1, C, H, W] in strips, added from the top to the bottom.

    Args:
        keeper: where it lies.
        channels: C.
        height: H.
        width: W.
        measured: whether a normalisation follows, so that rows are summed as they are added.
    """

    def __init__(self, keeper: Keeper, channels: int, height: int, width: int, *, measured: bool = True) -> None:
        self.keeper, self.channels, self.height, self.width = keeper, channels, height, width
        self._strips: list[_Strip] = []
        self._here: tuple[int, Tensor] | None = None
        self._added = 0
        # Sums and sums of squares of every row.
        self._sums = torch.empty(2, channels, height, dtype=torch.float64, device=keeper.device) if measured else None

    def add(self, rows: Tensor) -> None:
        """Append rows [1, C, r, W]."""
        start, stop = self._added, self._added + rows.shape[2]
        if self._sums is not None:
            for first, last in _chunks(rows):
                wide = rows[0, :, first:last].double()
                self._sums[0, :, start + first : start + last] = wide.sum(2)
                self._sums[1, :, start + first : start + last] = wide.square_().sum(2)
        edges = {}
        if self.keeper.on_host and stop - start > 1:
            edges = {start: self.keeper.keep(rows[:, :, :1]), stop - 1: self.keeper.keep(rows[:, :, -1:])}
        self._strips.append(_Strip(start, stop, self.keeper.keep(rows), edges))
        self._added = stop

    def norm_factors(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel, [C, 1, 1] in float32, by which a normalisation over the whole plane is applied."""
        if self._sums is None or self._added != self.height:
            raise RuntimeError(f"a plane's normalisation was asked for with {self._added} of {self.height} rows measured")
        count = self.channels // norm.num_groups * self.height * self.width
        mean, square = self._sums.sum(2).view(2, norm.num_groups, -1).sum(2) / count
        deviation = ((square - mean.square()).clamp_(min=0) + norm.eps).sqrt_()
        per_group = self.channels // norm.num_groups
        scale, shift = (1 / deviation).repeat_interleave(per_group), (-mean / deviation).repeat_interleave(per_group)
        if norm.weight is not None:
            shift = shift * norm.weight.double() + norm.bias.double()
            scale = scale * norm.weight.double()
        return scale.float().view(-1, 1, 1), shift.float().view(-1, 1, 1)

    def window(self, start: int, stop: int, norm: tuple[Tensor, Tensor] | None = None, *, silu: bool = False) -> Tensor:
        """A copy of rows on the device; rows outside the plane are zeros.

        Args:
            start: first row, which may be negative.
            stop: row after the last, which may lie beyond the plane.
            norm: of `norm_factors`; None copies the values as they are.
            silu: whether SiLU follows the normalisation.
        """
        rows: Tensor | None = None
        for first, piece in self._pieces(max(start, 0), min(stop, self.height)):
            if rows is None:
                rows = self.keeper.empty(self.channels, stop - start, self.width, piece.dtype)
            place = rows[:, :, first - start : first - start + piece.shape[2]]
            if norm is None:
                place.copy_(piece)
            else:
                for a, b in _chunks(piece):
                    _normalise(piece[0, :, a:b], norm, place[0, :, a:b], silu=silu)
            del place, piece
        assert rows is not None, "a window without rows of the plane"
        if start < 0:
            rows[:, :, :-start].zero_()
        if stop > self.height:
            rows[:, :, self.height - stop :].zero_()
        return rows

    def add_to(self, rows: Tensor, start: int) -> None:
        """Add the plane's rows from `start` on to rows on the device, in place."""
        for first, piece in self._pieces(start, start + rows.shape[2]):
            rows[:, :, first - start : first - start + piece.shape[2]] += piece

    def forget_before(self, row: int) -> None:
        """Let go of strips that end before a row."""
        self._strips = [strip for strip in self._strips if strip.stop > row]
        if self._here is not None and all(strip.start != self._here[0] for strip in self._strips):
            self._here = None

    def let_go(self) -> None:
        """Let go of what is on the device only to be read again."""
        self._here = None

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        if not self._strips or self._strips[0].start > start or self._added < stop:
            raise RuntimeError(f"rows {start} to {stop} of a plane were asked for, which are gone or not there yet")
        for strip in self._strips:
            first, last = max(start, strip.start), min(stop, strip.stop)
            if first >= last:
                continue
            if last - first == 1 and first in strip.edges:
                yield first, self.keeper.bring(strip.edges[first])
                continue
            if not self.keeper.on_host:
                yield first, strip.rows[:, :, first - strip.start : last - strip.start]
                continue
            if self._here is None or self._here[0] != strip.start:
                self._here = None
                self._here = strip.start, self.keeper.bring(strip.rows)
            yield first, self._here[1][:, :, first - strip.start : last - strip.start]


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Spans of rows [1, C, r, W] of a bounded number of elements."""
    height = rows.shape[2]
    step = max(1, _CHUNK // (rows.shape[1] * rows.shape[3]))
    for first in range(0, height, step):
        yield first, min(first + step, height)


def _normalise(rows: Tensor, norm: tuple[Tensor, Tensor], out: Tensor, *, silu: bool) -> None:
    scale, shift = norm
    # Rounded to the decoder's precision where its own layers round: after the normalisation and after SiLU.
    out.copy_(torch.addcmul(shift, rows.float(), scale))
    if silu:
        F.silu(out, inplace=True)
