"""The two kinds of transformer block, on a packed batch.

A block receives each residual stream together with its normalised, modulated form, and ends by adding its output and preparing
that form for the block that follows: gated addition and the next LayerNorm are one pass over the data.

What does not change from step to step is looked up once per batch (`Run.prepared`): a `_prepare` function fetches layers,
layouts and kernels, and the function within it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from uso_kernels.gated_residual import gated_residual_into
from uso_kernels.gelu_concat import gelu_concat
from uso_kernels.operation import CallSite
from uso_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_into
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .block_layers import FeedForward, QKNorm, SelfAttention, prepare_finish, prepare_hidden, values_of
from .hooks import is_hooked
from .linear import Linear
from .modulation import DOUBLE_VECTORS, SINGLE_VECTORS, ModulationLinear
from .packing import JointRows, PackedBatch
from .params import TransformerParams
from .residual import NextNorm, Residual, proceed
from .run import Run


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

    def first_norms(self, vectors: Sequence[Tensor]) -> tuple[NextNorm, NextNorm]:
        """The norms before attention, of text and of image, from this block's twelve vectors [S, C]."""
        text = NextNorm(vectors[6], vectors[7], self.txt_attn.qkv.takes)
        return text, NextNorm(vectors[0], vectors[1], self.img_attn.qkv.takes)

    def forward(
        self, text: Residual, image: Residual, vectors: Sequence[Tensor], run: Run, following: tuple[NextNorm, NextNorm] | None
    ) -> tuple[Residual, Residual]:
        """Run the block.

        Args:
            text: residual of [T_txt, C].
            image: residual of [T_img, C].
            vectors: twelve of the modulation table, [S, C] each.
            run: the batch, and what to compute it with.
            following: the next block's norms of text and image; None after the last double block.

        Returns:
            Both residuals after the block.
        """
        return run.prepared(self, self._prepare)(text, image, vectors, following)

    def _prepare(self, run: Run) -> _DoubleStep:
        attend = self._prepare_attention(run)
        finish_image = prepare_finish(self.img_attn.proj, self.img_mlp, run.batch.image, run)
        finish_text = prepare_finish(self.txt_attn.proj, self.txt_mlp, run.batch.text, run)

        def compute(
            text: Residual, image: Residual, vectors: Sequence[Tensor], following: tuple[NextNorm, NextNorm] | None
        ) -> tuple[Residual, Residual]:
            text_attended, image_attended = attend(text.normed, image.normed)
            text_next, image_next = following or (None, None)
            image = finish_image(image.x, image_attended, vectors[:6], image_next)
            return finish_text(text.x, text_attended, vectors[6:], text_next), image

        return compute

    def _prepare_attention(self, run: Run) -> Callable[[Rows, Rows], tuple[Rows, Rows]]:
        """Attention of both streams to both, from their normalised forms, as their output projections take it."""
        batch, heads, dtype = run.batch, self.heads, self.txt_attn.qkv.dtype
        like, shape = batch.text_tokens.new_empty(0, dtype=dtype), (batch.joint.rows, 3 * heads * self.head_dim)
        # Both streams' projections in one matrix, if its rows are in joint order then; else values are moved like q and k.
        # Autograd keeps the first stream's projection, which writing the second's beside it would change.
        # So it is where a hook answers with memory of its own.
        answered = is_hooked(self.txt_attn.qkv) or is_hooked(self.img_attn.qkv)
        in_place = run.fusion.values and batch.is_in_order and not torch.is_grad_enabled() and not answered
        attend, take_keys = run.prepare_attention(like, batch.joint), run.prepare_keys()
        place_text = _prepare_place(self.txt_attn, batch.text, batch.text_in_joint)
        place_image = _prepare_place(self.img_attn, batch.image, batch.image_in_joint)
        # Both streams in one launch: as 8-bit rows where both matrices take them.
        takes = self.txt_attn.proj.takes if self.txt_attn.proj.takes == self.img_attn.proj.takes else None

        def compute(text: Rows, image: Rows) -> tuple[Rows, Rows]:
            q, k = batch.new_heads(dtype, heads, self.head_dim, 2)
            projected = like.new_empty(shape) if in_place else None
            v = batch.new_heads(dtype, heads, self.head_dim, 1)[0] if projected is None else None
            of_text, of_image = _by_stream(batch, q, k, v, projected)
            place_text(text, *of_text)
            if torch.is_grad_enabled():  # For autograd a view is what its tensor was when the view was taken.
                _, of_image = _by_stream(batch, q, k, v, projected)
            place_image(image, *of_image)
            if projected is not None:
                v = values_of(projected, heads)
            assert v is not None
            if take_keys is not None:
                del of_text, of_image, projected
                k = take_keys(k)
                v = take_keys(v)
            return batch.split(attend(q, k, v)().flatten(1), takes)

        return compute


_DoubleStep = Callable[[Residual, Residual, Sequence[Tensor], tuple[NextNorm, NextNorm] | None], tuple[Residual, Residual]]


def _by_stream(batch: PackedBatch, *joint: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    parts = [(None, None) if x is None else batch.by_stream(x) for x in joint]
    return [part[0] for part in parts], [part[1] for part in parts]


def _prepare_place(attn: SelfAttention, layout: Ragged, joint: JointRows) -> Callable[..., None]:
    """One stream's projection, and its way into the joint order: q, k and v there, or the projection itself."""
    project, call = attn.qkv.prepare(layout), CallSite(qk_norm_rope_into)
    scales = attn.norm.query_norm.scale, attn.norm.key_norm.scale
    rows, cos, sin = joint

    def compute(normed: Rows, q: Tensor, k: Tensor, v: Tensor | None, out: Tensor | None) -> None:
        qk_norm_rope(project(normed, out=out), *scales, cos, sin, rows, q, k, v, call=call)

    return compute


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

    def first_norm(self, vectors: Sequence[Tensor]) -> NextNorm:
        """The norm before this block, from its three vectors [S, C]."""
        return NextNorm(vectors[0], vectors[1], self.linear1.takes)

    def forward(
        self, residual: Residual, vectors: Sequence[Tensor], run: Run, following: NextNorm, *, is_last: bool = False
    ) -> Residual:
        """Run the block.

        Args:
            residual: of [T, C].
            vectors: three of the modulation table, [S, C] each.
            run: the batch, and what to compute it with.
            following: the next norm.
            is_last: only the rows of the images being made leave the last block, so only they are computed: keys and values
                need every row; queries, MLP and output do not. `residual.normed` must be floats then.

        Returns:
            The residual after the block, [T, C], or [T_out, C] after the last one.
        """
        return run.prepared(self, self._prepare_last if is_last else self._prepare)(residual, vectors, following)

    def _prepare(self, run: Run) -> _SingleStep:
        tiles, call = run.batch.joint.tile_sequence, CallSite(gated_residual_into)
        attention_and_mlp = self._prepare_attention_and_mlp(run)

        def compute(residual: Residual, vectors: Sequence[Tensor], following: NextNorm) -> Residual:
            return proceed(residual.x, attention_and_mlp(residual.normed), vectors[2], tiles, following, call)

        return compute

    def _prepare_last(self, run: Run) -> _SingleStep:
        rows, tiles, call = run.batch.output_joint_rows, run.batch.output.tile_sequence, CallSite(gated_residual_into)
        attention_and_mlp = self._prepare_attention_and_mlp(run, rows)

        def compute(residual: Residual, vectors: Sequence[Tensor], following: NextNorm) -> Residual:
            y = attention_and_mlp(residual.normed)
            return proceed(residual.x.index_select(0, rows), y, vectors[2], tiles, following, call)

        return compute

    def _prepare_attention_and_mlp(self, run: Run, rows: Tensor | None = None) -> Callable[[Rows], Tensor]:
        """The block's output for every row, or for some."""
        if run.fusion.parts and self.linear2.takes is None and not (is_hooked(self.linear1) or is_hooked(self.linear2)):
            return self._prepare_by_parts(run, rows)
        return self._prepare_joined(run) if rows is None else self._prepare_joined_of_rows(run, rows)

    def _prepare_by_parts(self, run: Run, rows: Tensor | None) -> Callable[[Rows], Tensor]:
        batch, width, in_place = run.batch, self.width, run.fusion.values
        layout = batch.joint if rows is None else batch.output
        project = self.linear1.prepare(batch.joint, slice(0, 3 * width))
        hidden_layer = prepare_hidden(self.linear1, layout, run, self.linear2, slice(3 * width, None))
        contract = self.linear2.prepare_parts((width, self.linear2.in_features - width), layout)
        like = batch.text_tokens.new_empty(0, dtype=self.linear1.dtype)
        attend = run.prepare_attention(like, layout)
        queries_keys_values = self._prepare_queries_keys_values(run)

        def compute(normed: Rows) -> Tensor:
            q, k, v = queries_keys_values(project(normed), in_place)
            if rows is not None:
                q = q.index_select(0, rows)
            attended = attend(q, k, v)  # Where processes exchange rows for it, they do so beside the MLP's hidden layer.
            del q, k, v  # The hidden layer may have their memory.
            if rows is not None:
                assert isinstance(normed, Tensor)
                normed = normed.index_select(0, rows)
            hidden = hidden_layer(normed)
            del normed
            return contract(attended().flatten(1), hidden)

        return compute

    def _prepare_joined(self, run: Run) -> Callable[[Rows], Tensor]:
        """One product for q, k, v and the hidden layer, one for attention's result beside the activated hidden layer."""
        layout, width, takes = run.batch.joint, self.width, self.linear2.takes
        project, contract = self.linear1.prepare(layout), self.linear2.prepare(layout)
        attend, queries_keys_values = self._prepare_attention(run, layout), self._prepare_queries_keys_values(run)
        in_place = run.fusion.values and takes is not None

        def compute(normed: Rows) -> Tensor:
            projected = project(normed)
            # Where values are copied, attention's result may take their columns: beside the MLP, where linear2 reads.
            operand = projected[:, 2 * width :] if takes is None else None
            # q, k and v are the call's alone: what follows may have their memory.
            attended = attend(*queries_keys_values(projected[:, : 3 * width], in_place), operand)
            return contract(gelu_concat(attended, projected[:, 3 * width :], takes, out=operand))

        return compute

    def _prepare_joined_of_rows(self, run: Run, rows: Tensor) -> Callable[[Rows], Tensor]:
        layout, width, takes, columns = run.batch.output, self.width, self.linear2.takes, self.linear2.in_features
        project, contract = self.linear1.prepare(run.batch.joint, slice(0, 3 * width)), self.linear2.prepare(layout)
        expand = self.linear1.prepare(layout, slice(3 * width, None))
        attend, queries_keys_values = self._prepare_attention(run, layout), self._prepare_queries_keys_values(run)
        in_place = run.fusion.values

        def compute(normed: Rows) -> Tensor:
            assert isinstance(normed, Tensor)
            qkv = project(normed)
            q, k, v = queries_keys_values(qkv, in_place)
            operand = q.new_empty(len(rows), columns) if takes is None else None
            attended = attend(q.index_select(0, rows), k, v, operand)
            del qkv, q, k, v
            return contract(gelu_concat(attended, expand(normed.index_select(0, rows)), takes, out=operand))

        return compute

    def _prepare_queries_keys_values(self, run: Run) -> Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]]:
        """What attention takes from a projection [T, 3C], its values where they are (True) or in memory of their own."""
        heads, head_dim, new_heads, call = self.heads, self.head_dim, run.batch.new_heads, CallSite(qk_norm_rope_into)
        scales, tables = (self.norm.query_norm.scale, self.norm.key_norm.scale), (run.batch.cos, run.batch.sin)
        take_keys = run.prepare_keys()

        def compute(qkv: Tensor, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
            q, k = new_heads(qkv.dtype, heads, head_dim, 2)
            v = None if in_place else torch.empty_like(q)
            qk_norm_rope(qkv, *scales, *tables, None, q, k, v, call=call)
            v = values_of(qkv, heads) if v is None else v
            if take_keys is not None:
                del qkv
                k = take_keys(k)
                v = take_keys(v)
            return q, k, v

        return compute

    def _prepare_attention(self, run: Run, queries: Ragged) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
        """Attention's result [T_q, C], in the first columns of linear2's operand where there is one."""
        width, heads, attend = self.width, (self.heads, self.head_dim), run.prepare_attention_into(queries)

        def compute(q: Tensor, k: Tensor, v: Tensor, operand: Tensor | None) -> Tensor:
            beside = None if operand is None else operand[:, :width].unflatten(1, heads)
            return attend(q, k, v, beside).flatten(1)

        return compute


_SingleStep = Callable[[Residual, Sequence[Tensor], NextNorm], Residual]
