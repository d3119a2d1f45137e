"""The two kinds of transformer block, on a packed batch.

A block receives each residual stream together with its normalised, modulated form, and ends by adding its output and preparing
that form for the block that follows: gated addition and the next LayerNorm are one pass over the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uso_kernels.attention import attention
from uso_kernels.gated_residual import gated_residual, gated_residual_layer_norm_modulate
from uso_kernels.qk_norm_rope import qk_norm_rope

from .linear import Linear
from .modulation import DOUBLE_VECTORS, SINGLE_VECTORS, ModulationLinear
from .packing import PackedBatch
from .params import TransformerParams


class Stream(NamedTuple):
    """A residual stream [T, C] and what the next block reads: the stream normalised and modulated, or None after the last."""

    x: Tensor
    normed: Tensor | None


class Norm(NamedTuple):
    """Shift and scale of the LayerNorm that follows, each [S, C]."""

    shift: Tensor
    scale: Tensor


class HeadScale(nn.Module):
    """RMSNorm weight of one head dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width), requires_grad=False)


class QKNorm(nn.Module):
    """RMSNorm weights of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = HeadScale(head_dim)
        self.key_norm = HeadScale(head_dim)


class SelfAttention(nn.Module):
    """Fused q/k/v projection, norms and output projection of one stream."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.qkv = Linear(width, 3 * width, bias=params.qkv_bias)
        self.norm = QKNorm(params.head_dim)
        self.proj = Linear(width, width)


def feed_forward(params: TransformerParams) -> nn.ModuleDict:
    """The two layers of an MLP under their checkpoint names."""
    return nn.ModuleDict({"0": Linear(params.hidden_size, params.mlp_width), "2": Linear(params.mlp_width, params.hidden_size)})


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, attending to each other."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.heads, self.head_dim = params.num_heads, params.head_dim
        self.img_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.img_attn = SelfAttention(params)
        self.img_mlp = feed_forward(params)
        self.txt_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.txt_attn = SelfAttention(params)
        self.txt_mlp = feed_forward(params)

    def modulation_vectors(self, activated: Tensor) -> Tensor:
        """Image's six vectors, then text's, of N conditioning vectors: [N, C] to [N, 12, C]."""
        return torch.cat((self.img_mod(activated), self.txt_mod(activated)), dim=1)

    @staticmethod
    def first_norms(modulation: Tensor) -> tuple[Norm, Norm]:
        """Shift and scale before attention, of text and of image, from this block's [S, 12, C]."""
        return Norm(modulation[:, 6], modulation[:, 7]), Norm(modulation[:, 0], modulation[:, 1])

    def forward(
        self, text: Stream, image: Stream, modulation: Tensor, batch: PackedBatch, following: tuple[Norm, Norm] | None
    ) -> tuple[Stream, Stream]:
        """Run the block.

        Args:
            text: streams of [T_txt, C].
            image: streams of [T_img, C].
            modulation: [S, 12, C].
            batch: where the sequences lie.
            following: the next block's norms of text and image; None after the last double block.

        Returns:
            Both streams after the block.
        """
        rows = batch.joint.rows
        q, k, v = (image.x.new_empty(rows, self.heads, self.head_dim) for _ in range(3))
        for stream, layer, joint_rows in (
            (text, self.txt_attn, batch.text_joint_rows),
            (image, self.img_attn, batch.image_joint_rows),
        ):
            scales = layer.norm.query_norm.scale, layer.norm.key_norm.scale
            qk_norm_rope(layer.qkv(stream.normed), *scales, batch.cos, batch.sin, joint_rows, q, k, v)
        attended = attention(q, k, v, batch.joint, batch.joint).flatten(1)
        text_attended, image_attended = batch.split(attended)
        text_next, image_next = following if following is not None else (None, None)
        image_tiles, text_tiles = batch.image.tile_sequence, batch.text.tile_sequence
        image = self._finish(image.x, self.img_attn, image_attended, self.img_mlp, modulation[:, :6], image_tiles, image_next)
        text = self._finish(text.x, self.txt_attn, text_attended, self.txt_mlp, modulation[:, 6:], text_tiles, text_next)
        return text, image

    @staticmethod
    def _finish(
        x: Tensor,
        layer: SelfAttention,
        attended: Tensor,
        mlp: nn.ModuleDict,
        modulation: Tensor,
        tiles: Tensor,
        following: Norm | None,
    ) -> Stream:
        """Output projection, MLP and the two gated additions of one stream; modulation is its [S, 6, C]."""
        _, _, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(1)
        x, normed = gated_residual_layer_norm_modulate(x, layer.proj(attended), attention_gate, mlp_shift, mlp_scale, tiles)
        y = mlp["2"](F.gelu(mlp["0"](normed), approximate="tanh"))
        return add_and_norm(x, y, mlp_gate, tiles, following)


class SingleBlock(nn.Module):
    """One joint stream; attention and MLP side by side, sharing their first and last matrix."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.heads, self.head_dim, self.width = params.num_heads, params.head_dim, width
        self.linear1 = Linear(width, 3 * width + params.mlp_width)
        self.linear2 = Linear(width + params.mlp_width, width)
        self.norm = QKNorm(params.head_dim)
        self.modulation = ModulationLinear(width, SINGLE_VECTORS)

    def modulation_vectors(self, activated: Tensor) -> Tensor:
        """Shift, scale and gate of N conditioning vectors: [N, C] to [N, 3, C]."""
        vectors: Tensor = self.modulation(activated)
        return vectors

    @staticmethod
    def first_norm(modulation: Tensor) -> Norm:
        """Shift and scale of this block's LayerNorm, from its [S, 3, C]."""
        return Norm(modulation[:, 0], modulation[:, 1])

    def forward(self, stream: Stream, modulation: Tensor, batch: PackedBatch, following: Norm) -> Stream:
        """Run the block on every row.

        Args:
            stream: streams of [T, C].
            modulation: [S, 3, C].
            batch: where the sequences lie.
            following: the next block's norm.

        Returns:
            The stream after the block.
        """
        projected = self.linear1(stream.normed)
        q, k, v = self._queries_keys_values(projected[:, : 3 * self.width], batch)
        attended = attention(q, k, v, batch.joint, batch.joint).flatten(1)
        y = self._output(attended, projected[:, 3 * self.width :])
        return add_and_norm(stream.x, y, modulation[:, 2], batch.joint.tile_sequence, following)

    def forward_output_rows(self, stream: Stream, modulation: Tensor, batch: PackedBatch, following: Norm) -> Stream:
        """Run the last block: only the rows of the images being made leave it, so only they are computed.

        Keys and values need every row; queries, MLP and output do not. Arguments as for `forward`; returns [T_out, C] streams.
        """
        rows = batch.output_joint_rows
        assert stream.normed is not None
        q, k, v = self._queries_keys_values(self.linear1(stream.normed, slice(0, 3 * self.width)), batch)
        mlp = self.linear1(stream.normed.index_select(0, rows), slice(3 * self.width, None))
        attended = attention(q.index_select(0, rows), k, v, batch.output, batch.joint).flatten(1)
        y = self._output(attended, mlp)
        return add_and_norm(stream.x.index_select(0, rows), y, modulation[:, 2], batch.output.tile_sequence, following)

    def _queries_keys_values(self, qkv: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (qkv.new_empty(batch.joint.rows, self.heads, self.head_dim) for _ in range(3))
        scales = self.norm.query_norm.scale, self.norm.key_norm.scale
        qk_norm_rope(qkv, *scales, batch.cos, batch.sin, None, q, k, v)
        return q, k, v

    def _output(self, attended: Tensor, mlp: Tensor) -> Tensor:
        y: Tensor = self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
        return y


def add_and_norm(x: Tensor, y: Tensor, gate: Tensor, tiles: Tensor, following: Norm | None) -> Stream:
    """Gated addition, together with the LayerNorm that follows it where one does."""
    if following is None:
        return Stream(gated_residual(x, y, gate, tiles), None)
    return Stream(*gated_residual_layer_norm_modulate(x, y, gate, following.shift, following.scale, tiles))
