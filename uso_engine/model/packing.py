"""A packed batch: sequences laid end to end, with the index tables that lead from one order of rows to another.

Four orders of the same tokens, each aligned per sequence (`uso_kernels.ragged`):
    text    style and text tokens        double blocks' text stream
    image   image and content tokens     double blocks' image stream
    joint   style, text, image, content, then the padding rows of both streams      attention and single blocks
    output  image tokens only            latents, the last single block and the final layer
The padding rows of the streams are padding rows of the joint order, one to one, so nothing is ever left unwritten.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from uso_kernels.ragged import Ragged, round_up_to_tile
from uso_kernels.rows import Rows
from uso_kernels.split_streams import split_streams

from .keys import Keys, Merged, copies_of
from .roofline import Tokens
from .sequence import Sequence


class _IndexTables(TypedDict):
    """`PackedBatch`'s tables between the four orders."""

    text_joint_rows: Tensor
    image_joint_rows: Tensor
    output_joint_rows: Tensor
    image_sources: Tensor | None
    joint_sources: Tensor | None


@dataclass(frozen=True)
class PackedBatch:
    """S sequences ready for the transformer.

    Args:
        text: layout of the text stream.
        image: layout of the image stream.
        joint: layout of the joint order.
        output: layout of latents and results.
        text_tokens: [T_txt, C], style and text tokens; padding rows are zero.
        content_tokens: [sum of L_ref, C], all content tokens, without padding.
        cos: float32 [T, D / 2] by joint row; padding rows are not turned.
        sin: float32 [T, D / 2].
        text_joint_rows: int64 [T_txt], the joint row of each text row.
        image_joint_rows: int64 [T_img].
        output_joint_rows: int64 [T_out]; padding rows repeat their sequence's last image row.
        image_sources: int64 [T_img], which row of (embedded latents, content tokens) each image row is; None: in that order.
        joint_sources: int64 [T], which row of (text, then image stream) each joint row is; None: in that order.
        merged: of each sequence, the text rows that stand for several.
    """

    text: Ragged
    image: Ragged
    joint: Ragged
    output: Ragged
    text_tokens: Tensor
    content_tokens: Tensor
    cos: Tensor
    sin: Tensor
    text_joint_rows: Tensor
    image_joint_rows: Tensor
    output_joint_rows: Tensor
    image_sources: Tensor | None
    joint_sources: Tensor | None
    merged: tuple[Merged, ...]

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """Lengths of every sequence; style tokens count as text, which they stand beside."""
        lengths = zip(self.text.lengths, self.image.lengths, self.output.lengths, map(copies_of, self.merged), strict=True)
        return tuple(Tokens(text, 0, output, image - output, copies) for text, image, output, copies in lengths)

    @cached_property
    def keys(self) -> Keys:
        """Where attention's keys and values lie."""
        return Keys.of(self.joint, self.merged)

    @property
    def is_in_order(self) -> bool:
        """Whether the text stream's rows and then the image stream's are the joint order."""
        return self.joint_sources is None

    def by_stream(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The text stream's rows of a tensor in joint order, and the image stream's, as views. Only where they are in order."""
        text, image = joint.split_with_sizes((self.text.rows, self.image.rows))
        return text, image

    @staticmethod
    def form(sequences: Sequences[Sequence]) -> PackedBatch:
        """Pack sequences; their tensors' device is the batch's.

        Raises:
            ValueError: no sequences.
        """
        if not sequences:
            raise ValueError("a packed batch needs at least one sequence, got none")
        device = sequences[0].text.device
        text = Ragged.pack([s.text_length for s in sequences], device)
        image = Ragged.pack([s.image_length + s.content_length for s in sequences], device)
        output = Ragged.pack([s.image_length for s in sequences], device)
        capacities = [round_up_to_tile(s.text_length) + round_up_to_tile(s.image_length + s.content_length) for s in sequences]
        joint = Ragged.pack([s.length for s in sequences], device, capacities=capacities)
        rows = _index_rows(sequences, text, image, joint, output)
        text_tokens = sequences[0].text.new_zeros(text.rows, sequences[0].text.shape[1])
        cos = torch.ones(joint.rows, sequences[0].cos.shape[1], dtype=torch.float32, device=device)
        sin = torch.zeros_like(cos)
        for i, sequence in enumerate(sequences):
            text_tokens[text.span(i)] = sequence.text
            cos[joint.span(i)] = sequence.cos
            sin[joint.span(i)] = sequence.sin
        return PackedBatch(
            text=text,
            image=image,
            joint=joint,
            output=output,
            text_tokens=text_tokens,
            content_tokens=torch.cat([s.content for s in sequences]),
            cos=cos,
            sin=sin,
            merged=tuple(s.merged for s in sequences),
            **rows,
        )

    def image_stream(self, embedded: Tensor) -> Tensor:
        """The image stream [T_img, C] of embedded latents [T_out, C] and the fixed content tokens."""
        return _arrange((embedded, self.content_tokens), self.image_sources)

    def merge(self, text: Tensor, image: Tensor) -> Tensor:
        """Bring both streams, [T_txt, C] and [T_img, C], into joint order [T, C]."""
        return _arrange((text, image), self.joint_sources)

    def split(self, joint: Tensor, dtype: torch.dtype | None = None) -> tuple[Rows, Rows]:
        """Bring joint rows [T, C] back to the text and image streams; views where the orders agree and rows stay floats.

        Args:
            joint: [T, C].
            dtype: the 8-bit type that the readers of the rows take, None for floats.
        """
        if dtype is None and self.is_in_order:
            return self.by_stream(joint)
        return split_streams(joint, self.text_joint_rows, self.image_joint_rows, dtype)


def _index_rows(sequences: Sequences[Sequence], text: Ragged, image: Ragged, joint: Ragged, output: Ragged) -> _IndexTables:
    """The index tables between the four orders."""
    device = text.tile_sequence.device
    text_joint, image_joint, output_joint, image_source = [], [], [], []
    content_start = output.rows
    for i, sequence in enumerate(sequences):
        first, image_first = joint.starts[i], joint.starts[i] + sequence.text_length
        image_tokens = sequence.image_length + sequence.content_length
        padding = image_first + image_tokens
        text_padding = round_up_to_tile(sequence.text_length) - sequence.text_length
        image_padding = round_up_to_tile(image_tokens) - image_tokens
        output_padding = round_up_to_tile(sequence.image_length) - sequence.image_length
        text_joint += [torch.arange(first, image_first), torch.arange(padding, padding + text_padding)]
        padding += text_padding
        image_joint += [torch.arange(image_first, image_first + image_tokens), torch.arange(padding, padding + image_padding)]
        last = image_first + sequence.image_length - 1
        output_joint += [torch.arange(image_first, last + 1), torch.full((output_padding,), last)]
        image_source += [
            torch.arange(output.starts[i], output.starts[i] + sequence.image_length),
            torch.arange(content_start, content_start + sequence.content_length),
            torch.full((image_padding,), output.starts[i]),
        ]
        content_start += sequence.content_length
    text_rows, image_rows, source = torch.cat(text_joint), torch.cat(image_joint), torch.cat(image_source)
    joint_source = torch.empty(joint.rows, dtype=torch.int64)
    joint_source[text_rows] = torch.arange(text.rows)
    joint_source[image_rows] = torch.arange(text.rows, joint.rows)
    return _IndexTables(
        text_joint_rows=text_rows.to(device),
        image_joint_rows=image_rows.to(device),
        output_joint_rows=torch.cat(output_joint).to(device),
        image_sources=_unless_in_order(source, device),
        joint_sources=_unless_in_order(joint_source, device),
    )


def _arrange(parts: tuple[Tensor, Tensor], sources: Tensor | None) -> Tensor:
    """Two tensors laid end to end, or the rows of that in another order."""
    stacked = torch.cat(parts)
    return stacked if sources is None else stacked.index_select(0, sources)


def _unless_in_order(rows: Tensor, device: torch.device) -> Tensor | None:
    return None if torch.equal(rows, torch.arange(len(rows))) else rows.to(device)
