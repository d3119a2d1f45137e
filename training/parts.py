"""The trainable parts of uso-tiny: transformer, style projector and both text encoders, and what they make of a batch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from training.batched import condition, make_rotary, predict_velocity
from uso_engine.model.params import TransformerParams
from uso_engine.model.projector import StyleProjector
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.latents import pack_latent

EMBEDDED = Path("uso_engine/embedded/uso-tiny")
PARAMS = TransformerParams(
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=192,
    mlp_ratio=3.0,
    num_heads=3,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(16, 24, 24),
)
STYLE_TOKENS = 4
TEXT_LENGTH = 20
CLIP_LENGTH = 32
GRID = (8, 8)
"""Latent tokens of a 128x128 picture."""


class Parts(nn.ModuleDict):
    """transformer, projector, t5 and clip, with fresh weights."""

    def __init__(self) -> None:
        t5 = T5Config(**json.loads((EMBEDDED / "t5" / "config.json").read_text()), dropout_rate=0.0)
        clip = CLIPTextConfig(**json.loads((EMBEDDED / "clip" / "config.json").read_text()))
        projector = StyleProjector(64, 64, STYLE_TOKENS, PARAMS.hidden_size)
        super().__init__(
            {
                "transformer": Transformer(PARAMS),
                "projector": projector,
                "t5": T5EncoderModel(t5),
                "clip": CLIPTextModel(clip),
            }
        )
        for name in ("transformer", "projector"):
            _start(self[name])
        look_at_content(self["transformer"])  # type: ignore[arg-type]
        self.requires_grad_(True)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Muon for the matrices inside the transformer's blocks, AdamW at half the rate for everything else."""
        inside = [
            parameter
            for name, parameter in self["transformer"].named_parameters()
            if "blocks." in name and parameter.ndim == 2 and "mod" not in name
        ]
        chosen = {id(parameter) for parameter in inside}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [{"params": inside}, {"params": rest, "adam": True, "factor": 0.5}]

    def forget_guidance(self) -> None:
        """Gives the guidance input fresh weights whose answer is zero: the flow stage has taught it to be ignored."""
        guidance_in = self["transformer"].guidance_in
        _start(guidance_in)  # type: ignore[arg-type]
        nn.init.zeros_(guidance_in.out_layer.weight)  # type: ignore[union-attr, arg-type]


def _start(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith((".scale", "norm.weight")):
                parameter.fill_(1)
            elif parameter.ndim < 2 or name.endswith("lin.weight") or name.startswith("final_layer"):
                parameter.zero_()
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))


def look_at_content(model: Transformer) -> None:
    """Makes the last head of each double block's image stream look from every place to the same place in the content image.

    Left to itself, no head had done so after 700 steps: exchanging the content image changed no loss. Queries and keys
    get constants that the rotary embedding turns into a peak where the key lies one grid further down and to the right, where
    USO puts content images. Training goes on from there.
    """
    params = model.params
    first, *axes = params.axes_dim
    shift = float(GRID[0])
    query, key = torch.zeros(params.head_dim), torch.zeros(params.head_dim)
    start = first
    for width in axes:
        for pair in range(3):
            frequency = params.theta ** (-2 * pair / width)
            at = start + 2 * pair
            query[at] = 4.0
            key[at], key[at + 1] = 4 * math.cos(shift * frequency), -4 * math.sin(shift * frequency)
        start += width
    size, last = params.hidden_size, (params.num_heads - 1) * params.head_dim
    with torch.no_grad():
        for block in model.double_blocks:
            qkv: nn.Module = block.img_attn.qkv  # type: ignore[assignment, union-attr]
            for part, constant in ((0, query), (1, key)):
                rows = slice(part * size + last, part * size + last + params.head_dim)
                qkv.weight[rows] *= 0.2  # type: ignore[operator, index]
                qkv.bias[rows] = constant  # type: ignore[operator]


@dataclass(frozen=True)
class Batch:
    """Conditions of B images of one mode.

    Args:
        t5_ids: int64 [B, L_txt].
        clip_ids: int64 [B, CLIP_LENGTH].
        content: [B, 64, 64], packed latents; None without.
        levels: [B, 3, patches, width]; None without.
    """

    t5_ids: Tensor
    clip_ids: Tensor
    content: Tensor | None
    levels: Tensor | None

    def tokens(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text tokens, pooled text and style tokens."""
        text = parts["t5"](input_ids=self.t5_ids).last_hidden_state
        pooled = parts["clip"](input_ids=self.clip_ids).pooler_output
        style = None if self.levels is None else parts["projector"](self.levels.unbind(1))
        return text, pooled, style


def velocity(parts: Parts, batch: Batch, latents: Tensor, times: Tensor, guidance: Tensor) -> Tensor:
    """Velocity [B, L_img, 64] of packed latents at times [B] under guidance [B]."""
    text, pooled, style = batch.tokens(parts)
    model: Transformer = parts["transformer"]  # type: ignore[assignment]
    length = text.shape[1] + (0 if style is None else style.shape[1])
    rotary = make_rotary(model, length, GRID, 0 if batch.content is None else 1)
    activated = condition(model, times, guidance, pooled)
    return predict_velocity(model, latents, activated, text, batch.content, rotary, style)


def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids for T5, padded to TEXT_LENGTH, and for CLIP, padded to CLIP_LENGTH."""
    t5 = T5Tokenizer.from_pretrained(EMBEDDED / "t5", local_files_only=True)
    clip = CLIPTokenizer.from_pretrained(EMBEDDED / "clip", local_files_only=True)
    ids = [
        tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        for tokenizer, length in ((t5, TEXT_LENGTH), (clip, CLIP_LENGTH))
    ]
    return ids[0], ids[1]


def pack(latents: npt.NDArray[np.float16]) -> Tensor:
    """float16 latents [B, 16, 16, 16] to packed tokens [B, 64, 64] in float32."""
    return pack_latent(torch.from_numpy(np.ascontiguousarray(latents)).float())
