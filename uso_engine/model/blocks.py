"""The two kinds of FLUX's block, on a packed batch.

    double   q, k, v = heads(qkv(norm(x)))                           of text and image, which attend to each other
             x = x + gate * proj(attention(q, k, v))
             x = x + gate * mlp(norm(x))
    single   q, k, v, hidden = heads(linear1(norm(x)))               of both streams as one
             x = x + gate * linear2([attention(q, k, v) | gelu(hidden)])

norm(x) is LayerNorm(x) (1 + scale) + shift, where shift, scale and gate are a block's modulation (`vectors`); heads is RMSNorm
and rotation of q and k. A gated addition and the norm after it are one pass over the data, even where that norm is the next
block's: so a block receives each stream with its normalised form (`Residual`), and makes the form that `following` asks for.

What does not change from step to step is looked up once per batch (`Run.prepared`): a `_prepare` function fetches layers,
layouts and kernels, and `compute` within it is the block. Names are deleted there so that what follows may have their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .block_layers import FeedForward, QKNorm, SelfAttention, prepare_hidden, prepare_parallel
from .heads import prepare_heads, prepare_joint_heads
from .linear import Linear
from .modulation import DOUBLE_VECTORS, SINGLE_VECTORS, ModulationLinear
from .params import TransformerParams
from .residual import NextNorm, Residual, prepare_addition
from .run import Run


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, attending to each other."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.heads = params.num_heads
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
        batch, text_proj, image_proj = run.batch, self.txt_attn.proj, self.img_attn.proj
        heads = prepare_joint_heads(self.txt_attn, self.img_attn, self.heads, run)
        attend = run.prepare_attention(self.txt_attn.qkv.dtype, batch.joint)
        # Both streams in one launch: as 8-bit rows where both matrices take them.
        takes = text_proj.takes if text_proj.takes == image_proj.takes else None
        finish_image, finish_text = run.pair(
            _prepare_finish(image_proj, self.img_mlp, batch.image, run),
            _prepare_finish(text_proj, self.txt_mlp, batch.text, run),
            (image_proj, self.img_mlp, text_proj, self.txt_mlp),
        )

        def compute(
            text: Residual, image: Residual, vectors: Sequence[Tensor], following: tuple[NextNorm, NextNorm] | None
        ) -> tuple[Residual, Residual]:
            q_k_v = heads(text.normed, image.normed)
            text_attended, image_attended = batch.split(attend(*q_k_v)().flatten(1), takes)
            del q_k_v
            text_next, image_next = following or (None, None)
            image = finish_image(image.x, image_attended, vectors[:6], image_next)
            return finish_text(text.x, text_attended, vectors[6:], text_next), image

        return compute


_DoubleStep = Callable[[Residual, Residual, Sequence[Tensor], tuple[NextNorm, NextNorm] | None], tuple[Residual, Residual]]


def _prepare_finish(
    output: Linear, mlp: FeedForward, layout: Ragged, run: Run
) -> Callable[[Tensor, Rows, Sequence[Tensor], NextNorm | None], Residual]:
    """What each stream does by itself after attention."""
    widen, narrow = mlp.layers
    proj, contract, expand = output.prepare(layout), narrow.prepare(layout), prepare_hidden(widen, layout, run, narrow)
    takes, add_attended, add_mlp = widen.takes, prepare_addition(layout), prepare_addition(layout)

    def compute(x: Tensor, attended: Rows, vectors: Sequence[Tensor], following: NextNorm | None) -> Residual:
        _, _, attention_gate, mlp_shift, mlp_scale, mlp_gate = vectors
        x, normed = add_attended(x, proj(attended), attention_gate, NextNorm(mlp_shift, mlp_scale, takes))
        hidden = expand(normed)
        del normed
        y = contract(hidden)
        del hidden
        return add_mlp(x, y, mlp_gate, following)

    return compute


class SingleBlock(nn.Module):
    """One joint stream; attention and MLP side by side, sharing their first and last matrix."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.heads = params.num_heads
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

    def _prepare_last(self, run: Run) -> _SingleStep:
        return self._prepare(run, run.batch.output_joint_rows)

    def _prepare(self, run: Run, rows: Tensor | None = None) -> _SingleStep:
        """The block for every row, or for some of the joint order."""
        layout = run.batch.joint if rows is None else run.batch.output
        project, expand, contract = prepare_parallel(self.linear1, self.linear2, run, rows)
        heads, add = prepare_heads(project, self.norm, self.heads, run, rows), prepare_addition(layout)
        attend = run.prepare_attention(self.linear1.dtype, layout)

        def compute(residual: Residual, vectors: Sequence[Tensor], following: NextNorm) -> Residual:
            x, normed = residual
            _, _, gate = vectors
            q, k, v, hidden = heads(normed)
            attended = attend(q, k, v)  # Where processes exchange rows for it, they do so beside the MLP's hidden layer.
            del q, k, v
            hidden = expand(normed) if hidden is None else hidden
            y = contract(attended().flatten(1), hidden)
            del attended, hidden
            return add(x if rows is None else x.index_select(0, rows), y, gate, following)

        return compute


_SingleStep = Callable[[Residual, Sequence[Tensor], NextNorm], Residual]
