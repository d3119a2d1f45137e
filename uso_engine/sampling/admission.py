"""Admission: everything about an image that no denoising step changes, computed once.

Text projection, content projection, rotary tables and the modulation table of all steps. The authors' code does all of it
inside every step.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
from torch import Tensor

from uso_engine.model.keys import Merged
from uso_engine.model.rope import Grid, PositionOffset, grid_positions, rope_tables
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer

from .family import FAMILIES, Family
from .latents import pack_latent


@dataclass(frozen=True)
class Conditions:
    """What an image is to be like.

    Args:
        text: [L_txt, context_in_dim], T5 tokens.
        pooled: [vec_in_dim], pooled CLIP embedding.
        style: style tokens of each style image, [n, C] each, already scaled.
        content: latents of each content image, [latent channels, h / 8, w / 8] each.
        merged: rows of the text that stand for several.
    """

    text: Tensor
    pooled: Tensor
    style: tuple[Tensor, ...] = ()
    content: tuple[Tensor, ...] = ()
    merged: Merged = ()


@torch.no_grad()
def admit(
    transformer: Transformer,
    conditions: Conditions,
    grid: Grid,
    sigmas: Sequences[float],
    guidance: float,
    *,
    reference_numerics: bool = False,
    position_offset: PositionOffset | None = None,
    family: Family = FAMILIES["uso"],
) -> Sequence:
    """Build the sequence of an image.

    Args:
        transformer: the loaded model; its device and dtype are the sequence's.
        conditions: text, style and content.
        grid: rows and columns of latent tokens of the image to make.
        sigmas: steps + 1 falling numbers.
        guidance: guidance scale; not read by a model without a guidance embedding.
        reference_numerics: round time and guidance to the model's dtype before they are embedded, as the authors do.
        position_offset: how content images are placed, see `uso_engine.model.rope.content_positions`; None for the family's.
        family: whose rule places them.

    Returns:
        A sequence; several images that differ only in their noise share it.

    Raises:
        ValueError: a condition of the wrong width, or a content latent of odd size.
    """
    device, dtype = transformer.img_in.weight.device, transformer.img_in.weight.dtype
    params = transformer.params
    _check_width("text", conditions.text, params.context_in_dim)
    _check_width("pooled", conditions.pooled, params.vec_in_dim)
    for i, tokens in enumerate(conditions.style):
        _check_width(f"style {i}", tokens, params.hidden_size)
    packed = [pack_latent(latent.to(device, dtype)) for latent in conditions.content]
    for i, tokens in enumerate(packed):
        _check_width(f"content {i}, packed,", tokens, params.in_channels)

    text = transformer.embed_text(conditions.text.to(device, dtype))
    style = sum(len(tokens) for tokens in conditions.style)
    text = torch.cat([*(tokens.to(device, dtype) for tokens in conditions.style), text])
    contents = [transformer.embed_latents(tokens) for tokens in packed]
    content = torch.cat(contents) if contents else text.new_zeros(0, params.hidden_size)

    grids = [(latent.shape[-2] // 2, latent.shape[-1] // 2) for latent in conditions.content]
    axes = len(params.axes_dim)
    mode = family.position_offset if position_offset is None else position_offset
    placed = family.content_positions(grid, grids, mode, axes=axes)
    positions = torch.cat([torch.zeros(len(text), axes, dtype=torch.float32), grid_positions(grid, axes=axes), *placed])
    cos, sin = rope_tables(positions, params.axes_dim, params.theta)

    time_dtype = dtype if reference_numerics else torch.float32
    times = torch.tensor(list(sigmas[:-1]), dtype=torch.float64).to(device, time_dtype)
    scales = torch.full_like(times, guidance)
    return Sequence(
        text=text,
        content=content,
        grid=grid,
        cos=cos.to(device),
        sin=sin.to(device),
        modulation=transformer.modulation_table(times, scales, conditions.pooled.to(device)),
        merged=tuple((style + row, count) for row, count in conditions.merged),
    )


def _check_width(name: str, tensor: Tensor, width: int) -> None:
    if tensor.shape[-1] != width:
        raise ValueError(f"{name} condition must be {width} wide for this model, got shape {tuple(tensor.shape)}")
