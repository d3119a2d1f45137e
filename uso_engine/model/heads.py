"""Attention's operands: queries, keys and values of every head in joint order, from the projections of the streams.

    q = rotate(RMSNorm(q)), k = rotate(RMSNorm(k)), v as it is

Values stay in the projection that made them where its rows are in joint order already; else they are moved like q and k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uso_kernels.operation import CallSite
from uso_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_into
from uso_kernels.ragged import Ragged
from uso_kernels.rows import Rows

from .block_layers import Project, QKNorm, SelfAttention
from .hooks import is_hooked
from .run import Run

Heads = tuple[Tensor, Tensor, Tensor]
"""q [T, H, D], and k and v as `Run.prepare_keys` makes them."""


def prepare_heads(
    project: Project, norm: QKNorm, heads: int, run: Run, rows: Tensor | None
) -> Callable[[Rows], tuple[Tensor, Tensor, Tensor, Rows | None]]:
    """The operands from the normalised form of one stream in joint order.

    Args:
        project: gives q, k and v [T, 3C], and what else it makes.
        norm: weights of the RMSNorms.
        heads: H.
        run: the batch.
        rows: the rows whose queries are wanted, int64; None: all.

    Returns:
        A function of [T, C], which gives q, k, v and what else `project` makes.
    """
    shape, in_place = (run.batch.joint.rows, heads, norm.head_dim), run.fusion.values
    scales, tables, call = norm.scales, (run.batch.cos, run.batch.sin), CallSite(qk_norm_rope_into)
    take_keys = run.prepare_keys()

    def compute(normed: Rows) -> tuple[Tensor, Tensor, Tensor, Rows | None]:
        qkv, beside = project(normed)
        q, k = qkv.new_empty(shape), qkv.new_empty(shape)
        v = None if in_place else qkv.new_empty(shape)
        qk_norm_rope(qkv, *scales, *tables, None, q, k, v, call=call)
        v = _values(qkv, shape) if v is None else v
        if take_keys is not None:
            del qkv
            k = take_keys(k)
            v = take_keys(v)
        return q if rows is None else q.index_select(0, rows), k, v, beside

    return compute


def prepare_joint_heads(text: SelfAttention, image: SelfAttention, heads: int, run: Run) -> Callable[[Rows, Rows], Heads]:
    """The operands from the normalised forms of the text and the image stream.

    Args:
        text: the text stream's layers.
        image: the image stream's.
        heads: H.
        run: the batch.

    Returns:
        A function of [T_txt, C] and [T_img, C].
    """
    batch, shape = run.batch, (run.batch.joint.rows, heads, text.norm.head_dim)
    like = batch.text_tokens.new_empty(0, dtype=text.qkv.dtype)
    # Each stream's part of a tensor in joint order; all of it, and an index of rows, where they are mixed. So they are under
    # autograd, which lets nobody write to what a split gives.
    in_order = batch.is_in_order and not torch.is_grad_enabled()
    by_stream = batch.by_stream if in_order else _twice
    rows = (None, None) if in_order else (batch.text_joint_rows, batch.image_joint_rows)
    # Both projections in one matrix, if its rows are in joint order; not where a hook answers with memory of its own.
    in_place = run.fusion.values and in_order and not (is_hooked(text.qkv) or is_hooked(image.qkv))
    value_shape = (shape[0], text.qkv.out_features) if in_place else shape
    cos, sin, take_keys = by_stream(batch.cos), by_stream(batch.sin), run.prepare_keys()
    place_image, place_text = run.pair(
        _prepare_place(image, batch.image, (cos[1], sin[1], rows[1]), in_place=in_place),
        _prepare_place(text, batch.text, (cos[0], sin[0], rows[0]), in_place=in_place),
        (image, text),
    )

    def compute(text_normed: Rows, image_normed: Rows) -> Heads:
        q, k, v = like.new_empty(shape), like.new_empty(shape), like.new_empty(value_shape)
        (text_q, image_q), (text_k, image_k), (text_v, image_v) = by_stream(q), by_stream(k), by_stream(v)
        place_image(image_normed, image_q, image_k, image_v)
        place_text(text_normed, text_q, text_k, text_v)
        if in_place:
            v = _values(v, shape)
        if take_keys is not None:
            del text_k, image_k, text_v, image_v
            k = take_keys(k)
            v = take_keys(v)
        return q, k, v

    return compute


def _twice(joint: Tensor) -> tuple[Tensor, Tensor]:
    return joint, joint


def _prepare_place(
    attn: SelfAttention, layout: Ragged, turns: tuple[Tensor, Tensor, Tensor | None], *, in_place: bool
) -> Callable[[Rows, Tensor, Tensor, Tensor], None]:
    """One stream's projection, and its way into q, k and v of the joint order; in place, v is the projection itself."""
    project, scales, call = attn.qkv.prepare(layout), attn.norm.scales, CallSite(qk_norm_rope_into)
    cos, sin, rows = turns

    def compute(normed: Rows, q: Tensor, k: Tensor, v: Tensor) -> None:
        if in_place:
            qk_norm_rope(project(normed, out=v), *scales, cos, sin, rows, q, k, None, call=call)
        else:
            qk_norm_rope(project(normed), *scales, cos, sin, rows, q, k, v, call=call)

    return compute


def _values(qkv: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values [T, H, D] in a projection [T, 3C]."""
    return qkv.view(shape[0], 3, *shape[1:]).select(1, 2)
