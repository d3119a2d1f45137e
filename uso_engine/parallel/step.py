"""One evaluation of the transformer by all processes: what the first one announces, and what each then does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uso_engine.model.keys import Merged
from uso_engine.model.packing import PackedBatch
from uso_engine.model.roofline import Tokens
from uso_engine.model.run import Run
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Observer, Transformer
from uso_kernels.ragged import Ragged

from .exchange import Exchange
from .group import Group
from .shares import Share, share_of


@dataclass(frozen=True)
class BatchDescription:
    """What the others need to make room for a batch.

    Args:
        lengths: of each sequence.
        width: C.
        half_head_dim: D / 2, columns of the rotary tables.
        dtype: of its tokens.
        merged: of each sequence, the text rows that stand for several.
    """

    lengths: tuple[Tokens, ...]
    width: int
    half_head_dim: int
    dtype: torch.dtype
    merged: tuple[Merged, ...]

    @staticmethod
    def of(batch: PackedBatch) -> BatchDescription:
        """Describe a batch."""
        text = batch.text_tokens
        return BatchDescription(batch.tokens, text.shape[1], batch.cos.shape[1], text.dtype, batch.merged)


@dataclass(frozen=True)
class StepMessage:
    """The first process evaluates the transformer.

    Args:
        number: of the batch.
        alive: numbers of the batches that may come again; the others are forgotten.
        batch: what it looks like, where it is new.
        modulation_shape: [S, vectors, C].
        observed: whether somebody looks at the intermediate tensors.
    """

    number: int
    alive: frozenset[int]
    batch: BatchDescription | None
    modulation_shape: tuple[int, ...]
    observed: bool


def send_batch(group: Group, batch: PackedBatch) -> None:
    """Give the others the tensors of a batch."""
    for tensor in (batch.text_tokens, batch.content_tokens, batch.cos, batch.sin):
        group.share(tensor.contiguous())


def receive_batch(group: Group, description: BatchDescription) -> PackedBatch:
    """Make a batch of what `send_batch` sends."""
    device, width = group.device, description.width
    sequences = []
    for entry, merged in zip(description.lengths, description.merged, strict=True):
        empty = torch.zeros(entry.text + entry.content, width, dtype=description.dtype, device=device)
        tables = torch.zeros(entry.text + entry.image + entry.content, description.half_head_dim, device=device)
        content = empty[entry.text :]
        unmodulated = empty.new_empty(0, 0, width)
        sequences.append(Sequence(empty[: entry.text], content, (1, entry.image), tables, tables, unmodulated, merged))
    batch = PackedBatch.form(sequences)
    for tensor in (batch.text_tokens, batch.content_tokens, batch.cos, batch.sin):
        group.share(tensor)
    return batch


@dataclass(frozen=True)
class SharedRun:
    """Evaluations of a batch by all processes, one after another.

    Args:
        share: this process's.
        exchange: with the other processes.
        run: of the share.
    """

    share: Share
    exchange: Exchange
    run: Run

    @staticmethod
    def begin(transformer: Transformer, group: Group, batch: PackedBatch) -> SharedRun:
        """Take this process's share of a batch."""
        share = share_of(batch, group.rank, group.size)
        exchange = Exchange(group, share)
        return SharedRun(share, exchange, transformer.run_of(share.batch, exchange))


def evaluate(
    transformer: Transformer,
    group: Group,
    shared: SharedRun,
    latents: Tensor,
    modulation: Tensor,
    *,
    observer: Observer | None,
    observed: bool,
) -> Tensor | None:
    """Compute this process's share of an evaluation, together with the others.

    Args:
        transformer: with the same weights in every process.
        group: the processes.
        shared: of the batch.
        latents: [T_out, in_channels] of the whole batch.
        modulation: [S, vectors, C].
        observer: sees the whole batch's intermediate tensors, on the first process.
        observed: whether there is one on the first process.

    Returns:
        [T_out, in_channels], the whole batch's velocity, on the first process; None on the others.
    """
    share, exchange = shared.share, shared.exchange

    def look(name: str, x: Tensor, layout: Ragged) -> None:
        order = share.order_of(layout)
        rows = exchange.gather(x, order)
        if observer is not None and rows is not None:
            observer(name, rows, order.whole)

    mine = latents.index_select(0, share.output.of(group.rank))
    velocity = transformer(shared.run, mine, modulation, look if observed else None)
    return exchange.gather(velocity, share.output)
