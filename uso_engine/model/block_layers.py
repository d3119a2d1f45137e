"""The layers of a block under their checkpoint names, and what both kinds of block do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from uso_kernels.gelu_concat import gelu_concat
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .hooks import LayerGroup, is_hooked
from .linear import Linear
from .params import TransformerParams
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
        self.head_dim = head_dim
        self.query_norm = HeadScale(head_dim)
        self.key_norm = HeadScale(head_dim)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Weights [D] of queries and of keys."""
        return self.query_norm.scale, self.key_norm.scale


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


Project = Callable[[Rows], tuple[Tensor, Rows | None]]


class ParallelMatrices(NamedTuple):
    """A single block's first and second matrix, each of which attention and MLP share.

    Args:
        project: of the normalised rows [T, C]: q, k and v [T, 3C], and the hidden layer [R, E] where one product makes both.
        expand: of the normalised rows: the hidden layer of the R rows that leave the block, where `project` does not make it.
        contract: of attention's result [R, C] and the hidden layer: the block's output [R, C].
    """

    project: Project
    expand: Callable[[Rows], Rows]
    contract: Callable[..., Tensor]


def prepare_parallel(linear1: Linear, linear2: Linear, run: Run, rows: Tensor | None) -> ParallelMatrices:
    """Both matrices at one place of a step: each by its parts, or whole, with [attended | gelu(hidden)] laid side by side.

    Args:
        linear1: from C to 3C and E columns.
        linear2: from C and E columns to C.
        run: the batch, and what is fused.
        rows: int64 [R], the rows of the joint order that leave the block; None: all.
    """
    joint, width, takes = run.batch.joint, linear2.out_features, linear2.takes
    layout = joint if rows is None else run.batch.output
    of_attention, of_mlp = slice(0, 3 * width), slice(3 * width, None)
    by_parts = run.fusion.parts and takes is None and not (is_hooked(linear1) or is_hooked(linear2))
    contract = _prepare_contract(linear2, layout, by_parts=by_parts)
    if rows is None and not by_parts:
        whole = linear1.prepare(joint)

        def project(normed: Rows) -> tuple[Tensor, Tensor]:
            projected = whole(normed)
            return projected[:, of_attention], projected[:, of_mlp]

        return ParallelMatrices(project, whole, contract)
    first = linear1.prepare(joint, of_attention)
    hidden = prepare_hidden(linear1, layout, run, linear2, of_mlp) if by_parts else linear1.prepare(layout, of_mlp)

    def expand(normed: Rows) -> Rows:
        assert rows is not None and isinstance(normed, Tensor)
        return hidden(normed.index_select(0, rows))

    return ParallelMatrices(lambda normed: (first(normed), None), hidden if rows is None else expand, contract)


def _prepare_contract(linear2: Linear, layout: Ragged, *, by_parts: bool) -> Callable[..., Tensor]:
    if by_parts:
        return linear2.prepare_parts((linear2.out_features, linear2.in_features - linear2.out_features), layout)
    product, takes = linear2.prepare(layout), linear2.takes
    return lambda attended, hidden: product(gelu_concat(attended, hidden, takes))
