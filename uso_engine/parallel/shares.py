"""How a packed batch is divided: every process has a share of each sequence's text, image and content rows.

A share is a packed batch of its own, of sequences with fewer rows; whatever works row by row runs on it unchanged. Attention
and results need the whole batch: `Order` leads from the rows of all shares, one after another, to the whole batch's and back.
Every process derives all shares from the same lengths, so they need not be exchanged. A process that gets no text or no image
token of a sequence, because there are fewer than processes, computes a copy of the first, which is read by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from uso_engine.model.keys import Keys
from uso_engine.model.packing import PackedBatch
from uso_engine.model.roofline import Tokens
from uso_engine.model.sequence import Sequence
from uso_kernels.ragged import Ragged, round_up_to_tile


def divide(count: int, size: int) -> tuple[slice, ...]:
    """Divide rows among processes: in whole tiles where that leaves none without rows, else as evenly as can be."""
    chunk = round_up_to_tile(-(-count // size))
    if chunk * (size - 1) < count:
        edges = [min(chunk * i, count) for i in range(size + 1)]
    else:
        edges = list(accumulate((count // size + (i < count % size) for i in range(size)), initial=0))
    return tuple(slice(start, end) for start, end in pairwise(edges))


@dataclass(frozen=True)
class Part:
    """One process's share of one sequence: which of its text, image and content tokens."""

    text: slice
    image: slice
    content: slice


@dataclass(frozen=True)
class Order:
    """One order of rows, of all shares and of the whole batch.

    Args:
        rows: of each process's share, padding included.
        whole: the whole batch's layout.
        from_shares: int64 [rows of the whole batch], where each row is among the rows of all shares, one after another; padding
            rows are given their sequence's first.
        to_shares: int64 [rows of all shares], where each is in the whole batch; padding likewise.
    """

    rows: tuple[int, ...]
    whole: Ragged
    from_shares: Tensor
    to_shares: Tensor

    def of(self, rank: int) -> Tensor:
        """Where the rows of one share are in the whole batch, int64."""
        start = sum(self.rows[:rank])
        return self.to_shares[start : start + self.rows[rank]]


@dataclass(frozen=True)
class Share:
    """One process's share of a batch, and the orders that lead to the whole.

    Args:
        batch: of its rows.
        text: order of the text stream.
        image: of the image stream.
        joint: of the joint order.
        output: of latents and results.
        keys: of the whole batch.
    """

    batch: PackedBatch
    text: Order
    image: Order
    joint: Order
    output: Order
    keys: Keys

    def order_of(self, layout: Ragged) -> Order:
        """The order that a layout of the share's batch belongs to."""
        for name in ("text", "image", "joint", "output"):
            if layout is getattr(self.batch, name):
                order: Order = getattr(self, name)
                return order
        raise ValueError("this layout belongs to no order of this share")


def share_of(batch: PackedBatch, rank: int, size: int) -> Share:
    """One process's share of a batch.

    Args:
        batch: the whole one.
        rank: of the process.
        size: processes.

    """
    lengths = batch.tokens
    parts = [_divided(entry, size) for entry in lengths]
    local = PackedBatch.form([_cut(batch, lengths, i, entry[rank]) for i, entry in enumerate(parts)])
    starts = [(0, 0, 0) for _ in lengths], [(0, 0, entry.image) for entry in lengths]
    joint_starts = [(0, entry.text, entry.text + entry.image) for entry in lengths]
    return Share(
        local,
        text=_order(batch.text, parts, starts[0], (True, False, False)),
        image=_order(batch.image, parts, starts[1], (False, True, True)),
        joint=_order(batch.joint, parts, joint_starts, (True, True, True)),
        output=_order(batch.output, parts, starts[0], (False, True, False)),
        keys=batch.keys,
    )


def _divided(lengths: Tokens, size: int) -> list[Part]:
    """The shares of one sequence, by process."""
    divided = (divide(count, size) for count in (lengths.text, lengths.image, lengths.content))
    return [Part(*slices) for slices in zip(*divided, strict=True)]


def _cut(batch: PackedBatch, lengths: tuple[Tokens, ...], index: int, part: Part) -> Sequence:
    """A share of one sequence, as a sequence: its image is a strip of one row."""
    entry, part = lengths[index], Part(_some(part.text), _some(part.image), part.content)
    text = batch.text_tokens[batch.text.span(index)][part.text]
    content_start = sum(earlier.content for earlier in lengths[:index])
    content = batch.content_tokens[content_start : content_start + entry.content][part.content]
    turned = part.text, _moved(part.image, entry.text), _moved(part.content, entry.text + entry.image)
    cos, sin = (torch.cat([table[batch.joint.span(index)][rows] for rows in turned]) for table in (batch.cos, batch.sin))
    # Its steps are the whole batch's: a share brings no modulation of its own.
    return Sequence(text, content, (1, part.image.stop - part.image.start), cos, sin, text.new_empty(0, 0, text.shape[1]))


def _some(part: slice) -> slice:
    """The rows of a share, or the first of all where it has none."""
    return part if part.stop > part.start else slice(0, 1)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _order(whole: Ragged, parts: list[list[Part]], starts: list[tuple[int, int, int]], kinds: tuple[bool, bool, bool]) -> Order:
    """An order of rows.

    Args:
        whole: its layout in the whole batch.
        parts: the shares of every sequence, by process.
        starts: where each sequence's text, image and content tokens begin among its rows.
        kinds: whether text, image and content tokens are in this order.
    """
    from_shares = torch.empty(whole.rows, dtype=torch.int64)
    to_shares: list[Tensor] = []
    rows, here, firsts = [], 0, list(whole.starts)
    for rank in range(len(parts[0])):
        begun = here
        for sequence, shares in enumerate(parts):
            first = firsts[sequence]
            places, capacity = _places(shares[rank], starts[sequence], kinds)
            has_token = places >= 0
            if rank == 0:
                from_shares[first : whole.end(sequence)] = here
            from_shares[first + places[has_token]] = here + has_token.nonzero()[:, 0]
            padding = places.new_zeros(capacity - len(places))
            to_shares.append(first + torch.cat((places.clamp(min=0), padding)))
            here += capacity
        rows.append(here - begun)
    device = whole.tile_sequence.device
    return Order(tuple(rows), whole, from_shares.to(device), torch.cat(to_shares).to(device))


def _places(part: Part, starts: tuple[int, int, int], kinds: tuple[bool, bool, bool]) -> tuple[Tensor, int]:
    """Where the rows of a share of one sequence are among the sequence's, -1 for copies, and its rows with their padding.

    As `PackedBatch.form` lays them: text, image, content, then the padding of text and that of the rest.
    """
    places, counts = [], []
    for entry, start, is_in, has_copy in zip(
        (part.text, part.image, part.content), starts, kinds, (True, True, False), strict=True
    ):
        rows = torch.arange(entry.start, entry.stop) + start if is_in else torch.arange(0)
        if is_in and has_copy and not len(rows):
            rows = torch.full((1,), -1)
        places.append(rows)
        counts.append(len(rows))
    return torch.cat(places), round_up_to_tile(counts[0]) + round_up_to_tile(counts[1] + counts[2])
