"""The two kinds of transformer block, on a packed batch.

A block receives each residual stream together with its normalised, modulated form, and ends by adding its output and preparing
that form for the block that follows: gated addition and the next LayerNorm are one pass over the data.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from uso_kernels.gelu_concat import gelu_concat
from uso_kernels.qk_norm_rope import qk_norm_rope
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .linear import Linear
from .modulation import DOUBLE_VECTORS, SINGLE_VECTORS, ModulationLinear
from .params import TransformerParams
from .residual import NextNorm, Residual, proceed
from .run import Run


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


class FeedForward(nn.ModuleDict):
    """The two layers of an MLP under their checkpoint names."""

    def __init__(self, params: TransformerParams) -> None:
        width, mlp_width = params.hidden_size, params.mlp_width
        super().__init__({"0": Linear(width, mlp_width), "2": Linear(mlp_width, width)})

    @property
    def layers(self) -> tuple[Linear, Linear]:
        """Both layers, or what has replaced them."""
        return cast("tuple[Linear, Linear]", (self["0"], self["2"]))


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, attending to each other."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.heads, self.head_dim = params.num_heads, params.head_dim
        self.img_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.img_attn = SelfAttention(params)
        self.img_mlp = FeedForward(params)
        self.txt_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.txt_attn = SelfAttention(params)
        self.txt_mlp = FeedForward(params)

    def modulation_vectors(self, activated: Tensor) -> Tensor:
        """Image's six vectors, then text's, of N conditioning vectors: [N, C] to [N, 12, C]."""
        return torch.cat((self.img_mod(activated), self.txt_mod(activated)), dim=1)

    def first_norms(self, modulation: Tensor) -> tuple[NextNorm, NextNorm]:
        """The norms before attention, of text and of image, from this block's [S, 12, C]."""
        text = NextNorm(modulation[:, 6], modulation[:, 7], self.txt_attn.qkv.takes)
        return text, NextNorm(modulation[:, 0], modulation[:, 1], self.img_attn.qkv.takes)

    def forward(
        self, text: Residual, image: Residual, modulation: Tensor, run: Run, following: tuple[NextNorm, NextNorm] | None
    ) -> tuple[Residual, Residual]:
        """Run the block.

        Args:
            text: residual of [T_txt, C].
            image: residual of [T_img, C].
            modulation: [S, 12, C].
            run: the batch, and what to compute it with.
            following: the next block's norms of text and image; None after the last double block.

        Returns:
            Both residuals after the block.
        """
        batch = run.batch
        text_attended, image_attended = self._attend(text.normed, image.normed, run)
        text_next, image_next = following if following is not None else (None, None)
        image = _finish(
            image.x, image_attended, modulation[:, :6], self.img_attn.proj, self.img_mlp, batch.image, run, image_next
        )
        text = _finish(text.x, text_attended, modulation[:, 6:], self.txt_attn.proj, self.txt_mlp, batch.text, run, text_next)
        return text, image

    def _attend(self, text: Rows, image: Rows, run: Run) -> tuple[Rows, Rows]:
        """Attention of both streams to both, from their normalised forms, as their output projections take it."""
        batch, width = run.batch, self.heads * self.head_dim
        q, k = batch.new_heads(self.txt_attn.qkv.dtype, self.heads, self.head_dim, 2)
        # Both streams' projections in one matrix, if its rows are in joint order then; else values are moved like q and k.
        projected = q.new_empty(len(q), 3 * width) if run.fusion.values and batch.is_in_order else None
        (v,) = batch.new_heads(q.dtype, self.heads, self.head_dim, 1) if projected is None else (None,)
        for normed, attn, layout, joint in (
            (text, self.txt_attn, batch.text, batch.text_in_joint),
            (image, self.img_attn, batch.image, batch.image_in_joint),
        ):
            scales = attn.norm.query_norm.scale, attn.norm.key_norm.scale
            cos, sin, joint_q, joint_k = (x[joint.span] for x in (batch.cos, batch.sin, q, k))
            qkv = attn.qkv(normed, layout, out=None if projected is None else projected[joint.span])
            joint_v = None if v is None else v[joint.span]
            qk_norm_rope(qkv, *scales, cos, sin, joint.rows, joint_q, joint_k, joint_v)
        values = _values(projected, self.heads) if projected is not None else v
        assert values is not None
        attended = run.attend(q, k, values, batch.joint).flatten(1)
        # Both streams in one launch: as 8-bit rows where both matrices take them.
        takes = self.txt_attn.proj.takes if self.txt_attn.proj.takes == self.img_attn.proj.takes else None
        return batch.split(attended, takes)


def _values(qkv: Tensor, heads: int) -> Tensor:
    """The values [T, H, D] in a projection [T, 3C]."""
    return qkv.chunk(3, dim=1)[2].unflatten(1, (heads, -1))


def _hidden(layer: Linear, x: Rows, layout: Ragged, run: Run, reader: Linear, outputs: slice = slice(None)) -> Rows:
    """The activated hidden layer of an MLP, as the matrix that reads it takes it."""
    if run.fusion.gelu and layer.takes is None and reader.takes is None:
        return layer.activated(x, layout, outputs)
    hidden = layer(x, layout, outputs)
    return gelu_concat(None, hidden, reader.takes, out=hidden)


def _finish(
    x: Tensor,
    attended: Rows,
    modulation: Tensor,
    proj: Linear,
    mlp: FeedForward,
    layout: Ragged,
    run: Run,
    following: NextNorm | None,
) -> Residual:
    """Output projection, MLP and the two gated additions of one stream; modulation is its [S, 6, C]."""
    tiles, (widen, narrow) = layout.tile_sequence, mlp.layers
    _, _, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(1)
    x, normed = proceed(x, proj(attended, layout), attention_gate, tiles, NextNorm(mlp_shift, mlp_scale, widen.takes))
    hidden = _hidden(widen, normed, layout, run, narrow)
    del normed
    y = narrow(hidden, layout)
    del hidden  # The new residual and its normed form may have its memory.
    return proceed(x, y, mlp_gate, tiles, following)


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
        return self.modulation(activated)

    def first_norm(self, modulation: Tensor) -> NextNorm:
        """The norm before this block, from its [S, 3, C]."""
        return NextNorm(modulation[:, 0], modulation[:, 1], self.linear1.takes)

    def forward(self, residual: Residual, modulation: Tensor, run: Run, following: NextNorm) -> Residual:
        """Run the block on every row.

        Args:
            residual: of [T, C].
            modulation: [S, 3, C].
            run: the batch, and what to compute it with.
            following: the next block's norm.

        Returns:
            The residual after the block.
        """
        y = self._attention_and_mlp(residual.normed, run)
        return proceed(residual.x, y, modulation[:, 2], run.batch.joint.tile_sequence, following)

    def forward_output_rows(self, residual: Residual, modulation: Tensor, run: Run, following: NextNorm) -> Residual:
        """Run the last block: only the rows of the images being made leave it, so only they are computed.

        Keys and values need every row; queries, MLP and output do not. Arguments as for `forward`, but `residual.normed` must
        be floats; returns a residual of [T_out, C].
        """
        assert isinstance(residual.normed, Tensor)
        rows, layout = run.batch.output_joint_rows, run.batch.output
        y = self._attention_and_mlp(residual.normed, run, rows)
        return proceed(residual.x.index_select(0, rows), y, modulation[:, 2], layout.tile_sequence, following)

    def _attention_and_mlp(self, normed: Rows, run: Run, rows: Tensor | None = None) -> Tensor:
        """The block's output for every row, or for some."""
        if run.fusion.parts and self.linear2.takes is None:
            return self._by_parts(normed, run, rows)
        if rows is None:
            return self._joined(normed, run)
        assert isinstance(normed, Tensor)
        return self._joined_of_rows(normed, rows, run)

    def _by_parts(self, normed: Rows, run: Run, rows: Tensor | None) -> Tensor:
        batch, width = run.batch, self.width
        q, k, v = self._queries_keys_values(self.linear1(normed, batch.joint, slice(0, 3 * width)), run, run.fusion.values)
        layout = batch.joint
        if rows is not None:
            layout, q = batch.output, q.index_select(0, rows)
        attended = run.attend(q, k, v, layout).flatten(1)
        del q, k, v  # The MLP's hidden layer may have their memory.
        if rows is not None:
            assert isinstance(normed, Tensor)
            normed = normed.index_select(0, rows)
        hidden = _hidden(self.linear1, normed, layout, run, self.linear2, slice(3 * width, None))
        del normed
        assert isinstance(hidden, Tensor)
        return self.linear2.of_parts((attended, hidden), layout)

    def _joined(self, normed: Rows, run: Run) -> Tensor:
        """One product for q, k, v and the hidden layer, one for attention's result beside the activated hidden layer."""
        layout, width = run.batch.joint, self.width
        projected = self.linear1(normed, layout)
        # Where values are copied, attention's result may take their columns: beside the MLP, where linear2 reads.
        operand = projected[:, 2 * width :] if self.linear2.takes is None else None
        in_place = run.fusion.values and operand is None
        attended = self._attend(*self._queries_keys_values(projected[:, : 3 * width], run, in_place), layout, run, operand)
        return self.linear2(gelu_concat(attended, projected[:, 3 * width :], self.linear2.takes, out=operand), layout)

    def _joined_of_rows(self, normed: Tensor, rows: Tensor, run: Run) -> Tensor:
        layout, width = run.batch.output, self.width
        qkv = self.linear1(normed, run.batch.joint, slice(0, 3 * width))
        q, k, v = self._queries_keys_values(qkv, run, run.fusion.values)
        operand = q.new_empty(len(rows), self.linear2.in_features) if self.linear2.takes is None else None
        attended = self._attend(q.index_select(0, rows), k, v, layout, run, operand)
        del qkv, q, k, v
        hidden = self.linear1(normed.index_select(0, rows), layout, slice(3 * width, None))
        return self.linear2(gelu_concat(attended, hidden, self.linear2.takes, out=operand), layout)

    def _queries_keys_values(self, qkv: Tensor, run: Run, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes from a projection [T, 3C], its values where they are or in memory of their own."""
        q, k = run.batch.new_heads(qkv.dtype, self.heads, self.head_dim, 2)
        v = None if in_place else torch.empty_like(q)
        qk_norm_rope(qkv, self.norm.query_norm.scale, self.norm.key_norm.scale, run.batch.cos, run.batch.sin, None, q, k, v)
        return q, k, _values(qkv, self.heads) if v is None else v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, run: Run, operand: Tensor | None) -> Tensor:
        """Attention's result [T_q, C], in the first columns of linear2's operand where there is one."""
        beside = None if operand is None else operand[:, : self.width].unflatten(1, (self.heads, self.head_dim))
        return run.attend(q, k, v, queries, out=beside).flatten(1)
