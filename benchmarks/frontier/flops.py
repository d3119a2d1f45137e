"""The arithmetic of a request, by count."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from uso_engine.evaluation.evaluate import draw_held_out
from uso_engine.model.modulation import DOUBLE_VECTORS, FINAL_VECTORS, SINGLE_VECTORS
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Tokens, step_flops
from uso_engine.pipeline import Pipeline

from .cases import SIDE, encode
from .settings import Setting

TOKENS = Tokens(text=20, style=12, image=64, content=64)
"""Of one picture of the embedded model at its default size."""
MERGED = Tokens(text=7, style=12, image=64, content=64, copies=13)
"""The same with the padding of a held-out triplet's prompt merged: 13 to 15 of its 20 rows, 14 in the mean."""
_UNSEEN = 990_000


def denoising_flops(params: TransformerParams, setting: Setting, tokens: Tokens | None = None) -> float:
    """FLOPs of a picture's admission and steps: products and attention, and the modulation of every step."""
    if tokens is None:
        tokens = MERGED if setting.text_padding == "merge" else TOKENS
    vectors = DOUBLE_VECTORS * params.depth + SINGLE_VECTORS * params.depth_single_blocks + FINAL_VECTORS
    modulation = 2.0 * vectors * params.hidden_size**2
    embedding = 2.0 * params.hidden_size * (tokens.text * params.context_in_dim + tokens.content * params.in_channels)
    return embedding + setting.steps * (step_flops(params, tokens) + modulation)


def count_ends(pipeline: Pipeline) -> float:
    """FLOPs of encoding a prompt, a style and a content image and of decoding a picture, counted while they run."""
    with FlopCounterMode(display=False) as counter:
        encode(pipeline, draw_held_out(2, _UNSEEN)[:1])  # A triplet that no cache knows.
        pipeline.decode(torch.zeros(1, pipeline.transformer.params.latent_channels, SIDE // 8, SIDE // 8))
    return float(counter.get_total_flops())


def request_flops(params: TransformerParams, setting: Setting, ends: float) -> dict[str, float]:
    """GFLOPs of denoising and of a whole request whose conditions are not cached."""
    denoising = denoising_flops(params, setting)
    return {"denoising_gflop": round(denoising / 1e9, 4), "request_gflop": round((denoising + ends) / 1e9, 4)}
