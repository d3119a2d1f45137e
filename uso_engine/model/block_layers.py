"""The layers of a block under their checkpoint names, and what both kinds of block do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from uso_kernels.gated_residual import gated_residual_into
from uso_kernels.gelu_concat import gelu_concat
from uso_kernels.operation import CallSite
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .hooks import LayerGroup, is_hooked
from .linear import Linear
from .params import TransformerParams
from .residual import NextNorm, Residual, proceed
from .run import Run


class HeadScale(LayerGroup):
    """RMSNorm weight of one head dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width), requires_grad=False)


class QKNorm(LayerGroup):
    """RMSNorm weights of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = HeadScale(head_dim)
        self.key_norm = HeadScale(head_dim)


class SelfAttention(LayerGroup):
    """Fused q/k/v projection, norms and output projection of one stream."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.qkv = Linear(width, 3 * width, bias=params.qkv_bias)
        self.norm = QKNorm(params.head_dim)
        self.proj = Linear(width, width)


class FeedForward(LayerGroup, nn.ModuleDict):
    """The two layers of an MLP under their checkpoint names."""

    def __init__(self, params: TransformerParams) -> None:
        width, mlp_width = params.hidden_size, params.mlp_width
        super().__init__({"0": Linear(width, mlp_width), "2": Linear(mlp_width, width)})

    @property
    def layers(self) -> tuple[Linear, Linear]:
        """Both layers, or what has replaced them."""
        return cast("tuple[Linear, Linear]", (self["0"], self["2"]))


def values_of(qkv: Tensor, heads: int) -> Tensor:
    """The values [T, H, D] in a projection [T, 3C]."""
    return qkv.view(qkv.shape[0], 3, heads, -1).select(1, 2)


def prepare_hidden(
    layer: Linear, layout: Ragged, run: Run, reader: Linear, outputs: slice = slice(None)
) -> Callable[[Rows], Rows]:
    """The activated hidden layer of an MLP, as the matrix that reads it takes it."""
    project, takes = layer.prepare(layout, outputs), reader.takes
    if run.fusion.gelu and layer.takes is None and takes is None and not is_hooked(layer):
        return project.activated

    def compute(x: Rows) -> Rows:
        hidden = project(x)
        return gelu_concat(None, hidden, takes, out=hidden)

    return compute


_Finish = Callable[[Tensor, Rows, Sequence[Tensor], NextNorm | None], Residual]


def prepare_finish(proj: Linear, mlp: FeedForward, layout: Ragged, run: Run) -> _Finish:
    """Output projection, MLP and the two gated additions of one stream."""
    tiles, (widen, narrow) = layout.tile_sequence, mlp.layers
    project, contract, hidden_layer = proj.prepare(layout), narrow.prepare(layout), prepare_hidden(widen, layout, run, narrow)
    takes, after_attention, after_mlp = widen.takes, CallSite(gated_residual_into), CallSite(gated_residual_into)

    def compute(x: Tensor, attended: Rows, vectors: Sequence[Tensor], following: NextNorm | None) -> Residual:
        _, _, attention_gate, mlp_shift, mlp_scale, mlp_gate = vectors
        norm = NextNorm(mlp_shift, mlp_scale, takes)
        x, normed = proceed(x, project(attended), attention_gate, tiles, norm, after_attention)
        hidden = hidden_layer(normed)
        del normed
        y = contract(hidden)
        del hidden  # The new residual and its normed form may have its memory.
        return proceed(x, y, mlp_gate, tiles, following, after_mlp)

    return compute
