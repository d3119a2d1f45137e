"""Encoders and autoencoder with random weights made on the device: of full size for a full-size model, else smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .workload import Workload

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of T5's encoder, CLIP's text model, SigLIP's tower and the autoencoder, by the names that their libraries use.

    Args:
        t5: of transformers' `T5Config`.
        clip: of `CLIPTextConfig`.
        vision: of `SiglipVisionConfig`.
        channels: of the autoencoder's four levels.
        layers_per_block: of the autoencoder.
        groups: of its group norms.
    """

    t5: Settings
    clip: Settings
    vision: Settings
    channels: tuple[int, int, int, int]
    layers_per_block: int
    groups: int

    @property
    def vision_tokens(self) -> int:
        """Patches of a style image."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _sizes(width: int, layers: int, heads: int, mlp: int, **others: int) -> dict[str, int]:
    """Settings of CLIP's and SigLIP's configurations."""
    names = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return {**names, **others}


def _t5(width: int, layers: int, heads: int, head_width: int, mlp: int, words: int) -> dict[str, int]:
    names = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": head_width, "d_ff": mlp}
    return {**names, "vocab_size": words}


FULL = EncoderSizes(
    t5=_t5(4096, 24, 64, 64, 10240, 32128),
    clip=_sizes(768, 12, 12, 3072, vocab_size=49408),
    vision=_sizes(1152, 27, 16, 4304, image_size=384, patch_size=14),
    channels=(128, 256, 512, 512),
    layers_per_block=2,
    groups=32,
)
THOUSANDTH = EncoderSizes(
    t5=_t5(64, 2, 4, 16, 128, 100),
    clip=_sizes(64, 2, 4, 128, vocab_size=100),
    vision=_sizes(48, 21, 4, 96, image_size=56, patch_size=14),
    channels=(8, 8, 16, 16),
    layers_per_block=1,
    groups=4,
)


def small_encoders(text_width: int, pooled_width: int) -> EncoderSizes:
    """Encoders for the small transformer: a sixth of SigLIP's width, a quarter of its patches, as many layers.

    Args:
        text_width: what the transformer takes of T5.
        pooled_width: what it takes of CLIP.
    """
    return EncoderSizes(
        t5=_t5(text_width, 4, 8, 64, 2 * text_width, 4096),
        clip=_sizes(pooled_width, 4, 4, 4 * pooled_width, vocab_size=4096),
        vision=_sizes(192, 27, 4, 716, image_size=196, patch_size=14),
        channels=(8, 16, 32, 32),
        layers_per_block=2,
        groups=8,
    )


def encoder_sizes(workload: Workload) -> EncoderSizes:
    """Sizes that fit a workload's model."""
    return FULL if workload.is_full_size else THOUSANDTH


def filled(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module built without memory, given small random weights on the device."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()))
        else:
            nn.init.ones_(parameter)
    for name, buffer in module.named_buffers():
        # Position ids are the only buffers of these encoders.
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer)) if "position_ids" in name else None
    return module


def text_modules(sizes: EncoderSizes) -> tuple[T5EncoderModel, CLIPTextModel]:
    """T5's and CLIP's encoders without values."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    # An end of text of 2 stands for the highest number in a prompt, whatever the vocabulary.
    with torch.device("meta"):
        return (
            T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes.t5)),
            CLIPTextModel(CLIPTextConfig(bos_token_id=0, eos_token_id=2, **sizes.clip)),
        )


def vision_module(sizes: EncoderSizes) -> SiglipVisionModel:
    """SigLIP's tower without values."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.device("meta"):
        return SiglipVisionModel(SiglipVisionConfig(**sizes.vision))


def autoencoder_module(sizes: EncoderSizes) -> AutoencoderKL:
    """The autoencoder without values."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=sizes.channels,
            layers_per_block=sizes.layers_per_block,
            latent_channels=16,
            norm_num_groups=sizes.groups,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
