"""How diffusers' FluxTransformer2DModel names and cuts the transformer's weights, and how they are put together again.

diffusers keeps q, k, v and a single block's feed-forward input apart where the canonical keys have one matrix, and orders the
last modulation as scale, shift where the canonical one is shift, scale.
Source: the parameter names of diffusers' FluxTransformer2DModel, and its AdaLayerNormContinuous for the order of the halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uso_engine.model.params import TransformerParams
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.model_shapes import transformer_shapes


@dataclass(frozen=True)
class RowPiece:
    """Rows of a canonical tensor that are rows of a tensor elsewhere.

    Args:
        name: the other tensor.
        rows: how many rows.
        row: the first of them in the canonical tensor.
        source_row: the first of them in the other tensor.
    """

    name: str
    rows: int
    row: int = 0
    source_row: int = 0


_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_STREAMS = (
    # our prefix, attention projections, their output, norm of q and k, modulation, feed-forward
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "norm1", "ff"),
    (
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        ("norm_added_q", "norm_added_k"),
        "norm1_context",
        "ff_context",
    ),
)


def diffusers_pieces(params: TransformerParams) -> dict[str, tuple[RowPiece, ...]]:
    """For every canonical key, the diffusers tensors that its rows come from, in the order of its rows.

    Args:
        params: the transformer's sizes.
    """
    shapes = transformer_shapes(params)
    pieces: dict[str, tuple[RowPiece, ...]] = {}
    for module, parts in _modules(params).items():
        for leaf in ("weight", "bias"):
            if f"{module}.{leaf}" in shapes:
                pieces[f"{module}.{leaf}"] = tuple(replace(part, name=f"{part.name}.{leaf}") for part in parts)
    for index in range(params.depth):
        for stream, _, _, norms, _, _ in _STREAMS:
            for norm, name in zip(("query_norm", "key_norm"), norms, strict=True):
                piece = RowPiece(f"transformer_blocks.{index}.attn.{name}.weight", params.head_dim)
                pieces[f"double_blocks.{index}.{stream}_attn.norm.{norm}.scale"] = (piece,)
    for index in range(params.depth_single_blocks):
        for norm, name in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            piece = RowPiece(f"single_transformer_blocks.{index}.attn.{name}.weight", params.head_dim)
            pieces[f"single_blocks.{index}.norm.{norm}.scale"] = (piece,)
    return {key: pieces[key] for key in shapes}


def _modules(params: TransformerParams) -> dict[str, tuple[RowPiece, ...]]:
    """For every canonical linear layer, the diffusers layers that its rows come from."""
    width, mlp_width = params.hidden_size, params.mlp_width
    modules: dict[str, tuple[RowPiece, ...]] = {
        "img_in": (RowPiece("x_embedder", width),),
        "txt_in": (RowPiece("context_embedder", width),),
        "final_layer.linear": (RowPiece("proj_out", params.in_channels),),
        "final_layer.adaLN_modulation.1": (
            RowPiece("norm_out.linear", width, row=0, source_row=width),
            RowPiece("norm_out.linear", width, row=width, source_row=0),
        ),
    }
    for ours, theirs in _EMBEDDERS.items():
        modules[f"{ours}.in_layer"] = (RowPiece(f"time_text_embed.{theirs}.linear_1", width),)
        modules[f"{ours}.out_layer"] = (RowPiece(f"time_text_embed.{theirs}.linear_2", width),)
    for index in range(params.depth):
        block = f"transformer_blocks.{index}"
        for stream, projections, out, _, modulation, feed_forward in _STREAMS:
            ours = f"double_blocks.{index}.{stream}"
            modules[f"{ours}_mod.lin"] = (RowPiece(f"{block}.{modulation}.linear", 6 * width),)
            modules[f"{ours}_attn.qkv"] = _stacked([f"{block}.attn.{name}" for name in projections], [width] * 3)
            modules[f"{ours}_attn.proj"] = (RowPiece(f"{block}.attn.{out}", width),)
            modules[f"{ours}_mlp.0"] = (RowPiece(f"{block}.{feed_forward}.net.0.proj", mlp_width),)
            modules[f"{ours}_mlp.2"] = (RowPiece(f"{block}.{feed_forward}.net.2", width),)
    for index in range(params.depth_single_blocks):
        ours, block = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        fused = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
        modules[f"{ours}.linear1"] = _stacked(fused, [width, width, width, mlp_width])
        modules[f"{ours}.linear2"] = (RowPiece(f"{block}.proj_out", width),)
        modules[f"{ours}.modulation.lin"] = (RowPiece(f"{block}.norm.linear", 3 * width),)
    return modules


def _stacked(names: list[str], rows: list[int]) -> tuple[RowPiece, ...]:
    return tuple(RowPiece(name, count, row=sum(rows[:i])) for i, (name, count) in enumerate(zip(names, rows, strict=True)))


def diffusers_shapes(params: TransformerParams) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a transformer by diffusers' key.

    Args:
        params: the transformer's sizes.
    """
    shapes = transformer_shapes(params)
    result: dict[str, tuple[int, ...]] = {}
    for key, pieces in diffusers_pieces(params).items():
        for piece in pieces:
            rows = max(piece.source_row + piece.rows, result.get(piece.name, (0,))[0])
            result[piece.name] = (rows, *shapes[key][1:])
    return result


class FusedSource:
    """Canonical tensors put together from the rows of another source's tensors when they are read.

    Args:
        base: where the pieces lie; closed together with this view.
        pieces: for every canonical key, the pieces that make up its rows.
        shapes: of the canonical keys.
    """

    def __init__(
        self, base: TensorSource, pieces: Mapping[str, tuple[RowPiece, ...]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._base = base
        self._pieces = dict(pieces)
        self._shapes = dict(shapes)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        dtypes = {self._base.dtype(piece.name) for piece in self._pieces[key]}
        # Pieces of one matrix stored in different types meet in the one that holds them all.
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(self, key: str) -> Tensor:
        pieces = self._pieces[key]
        if len(pieces) == 1:
            return self._base.read(pieces[0].name)
        fused = torch.empty(self._shapes[key], dtype=self.dtype(key))
        for piece in pieces:
            rows = self._base.read(piece.name)[piece.source_row : piece.source_row + piece.rows]
            fused[piece.row : piece.row + piece.rows] = rows
        return fused

    def describe(self) -> str:
        return self._base.describe()

    def close(self) -> None:
        self._base.close()
