"""The transformer on batches of equal-length sequences, differentiable, over the parameters of the engine's own module.

The engine's packed forward runs through operators without gradients. This is the same mathematics with a batch axis in plain
PyTorch; `tests/test_training_batched.py` holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_engine.model.block_layers import SelfAttention
from uso_engine.model.blocks import DoubleBlock, SingleBlock
from uso_engine.model.modulation import sinusoidal_embedding
from uso_engine.model.rope import content_positions, grid_positions, rope_tables
from uso_engine.model.transformer import Transformer


def make_rotary(model: Transformer, text_tokens: int, grid: tuple[int, int], contents: int) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines, float32 [L, D / 2], of style and text tokens, the image, and content images of its size."""
    positions = [torch.zeros(text_tokens, 3), grid_positions(grid), *content_positions(grid, [grid] * contents)]
    return rope_tables(torch.cat(positions), model.params.axes_dim, model.params.theta)


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None])


def _turn(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm and rotary embedding of queries or keys [B, L, H, D] -> [B, H, L, D]."""
    y = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)
    c, s = (table.to(x.dtype).repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))
    return torch.addcmul(y * c, y @ _swap(x.shape[-1]).to(x.dtype), s).transpose(1, 2)


@functools.lru_cache
def _swap(width: int) -> Tensor:
    """[D, D]: right-multiplied, turns each pair (a, b) into (-b, a)."""
    return torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (width // 2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, H, L, D]; as two products it is three times faster on a CPU, gradients included, than the fused one."""
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


def _double(
    block: DoubleBlock, text: Tensor, image: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    m = modulation.unbind(1)
    parts = []
    for x, layer, (shift, scale) in ((text, block.txt_attn, m[6:8]), (image, block.img_attn, m[0:2])):
        rows = slice(0, text.shape[1]) if x is text else slice(text.shape[1], None)
        q, k, v = _heads(layer.qkv(_norm(x, shift, scale)), block.heads)
        norm = layer.norm
        parts.append(
            (
                _turn(q, norm.query_norm.scale, cos[rows], sin[rows]),
                _turn(k, norm.key_norm.scale, cos[rows], sin[rows]),
                v.transpose(1, 2),
            )
        )
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
    attended = _attend(q, k, v)
    text = _finish(text, block.txt_attn, attended[:, : text.shape[1]], block.txt_mlp, m[6:])
    image = _finish(image, block.img_attn, attended[:, text.shape[1] :], block.img_mlp, m[:6])
    return text, image


def _finish(x: Tensor, layer: SelfAttention, attended: Tensor, mlp: torch.nn.ModuleDict, m: tuple[Tensor, ...]) -> Tensor:
    x = torch.addcmul(x, layer.proj(attended), m[2][:, None])
    return torch.addcmul(x, mlp["2"](F.gelu(mlp["0"](_norm(x, m[3], m[4])), approximate="tanh")), m[5][:, None])


def _single(block: SingleBlock, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, rows: slice) -> Tensor:
    """One single block; only `rows` leave it."""
    shift, scale, gate = modulation.unbind(1)
    normed = _norm(x, shift, scale)
    width = 3 * x.shape[-1]
    q, k, v = _heads(block.linear1(normed, outputs=slice(0, width)), block.heads)
    mlp = block.linear1(normed[:, rows], outputs=slice(width, None))
    q = _turn(q[:, rows], block.norm.query_norm.scale, cos[rows], sin[rows])
    k = _turn(k, block.norm.key_norm.scale, cos, sin)
    attended = _attend(q, k, v.transpose(1, 2))
    y = block.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
    return torch.addcmul(x[:, rows], y, gate[:, None])


def condition(model: Transformer, times: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
    """SiLU of the conditioning vectors, [B, C], of times [B], guidance scales [B] and pooled text [B, vec_in_dim]."""
    vector = model.time_in(sinusoidal_embedding(times)) + model.vector_in(pooled)
    if model.guidance_in is not None:
        vector = vector + model.guidance_in(sinusoidal_embedding(guidance))
    return F.silu(vector)


def predict_velocity(
    model: Transformer,
    latents: Tensor,
    activated: Tensor,
    text: Tensor,
    content: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    style: Tensor | None = None,
) -> Tensor:
    """Predicts the velocity of a batch.

    Args:
        model: its parameters may require gradients.
        latents: [B, L_img, in_channels].
        activated: [B, C], see `condition`.
        text: [B, L_txt, context_in_dim].
        content: [B, L_ref, in_channels], packed latents of content images; None without.
        rotary: see `make_rotary`.
        style: [B, 3n, C], projected style tokens; None without.

    Returns:
        [B, L_img, in_channels].
    """
    cos, sin = rotary
    text_x = model.embed_text(text)
    if style is not None:
        text_x = torch.cat((style.to(text_x.dtype), text_x), dim=1)
    image_x = model.embed_latents(latents if content is None else torch.cat((latents, content), dim=1))
    for block in cast(Iterable[DoubleBlock], model.double_blocks):
        text_x, image_x = _double(block, text_x, image_x, block.modulation_vectors(activated), cos, sin)
    x = torch.cat((text_x, image_x), dim=1)
    last = slice(text_x.shape[1], text_x.shape[1] + latents.shape[1])
    for i, single in enumerate(cast(Iterable[SingleBlock], model.single_blocks)):
        rows = last if i + 1 == len(model.single_blocks) else slice(0, x.shape[1])
        x = _single(single, x, single.modulation_vectors(activated), cos, sin, rows)
    shift, scale = model.final_layer.adaLN_modulation(activated).unbind(1)
    velocity: Tensor = model.final_layer.linear(_norm(x, shift, scale))
    return velocity
