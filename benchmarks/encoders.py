"""Encoders and autoencoder with random weights made on the device: of full size for a full-size model, else of a thousandth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .workload import Workload

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel


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


def text_modules(workload: Workload) -> tuple[T5EncoderModel, CLIPTextModel]:
    """T5's and CLIP's encoders without values."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    is_full = workload.is_full_size
    t5_config = T5Config(
        vocab_size=32128 if is_full else 100,
        d_model=4096 if is_full else 64,
        d_kv=64 if is_full else 16,
        d_ff=10240 if is_full else 128,
        num_layers=24 if is_full else 2,
        num_heads=64 if is_full else 4,
        feed_forward_proj="gated-gelu",
    )
    clip_config = CLIPTextConfig(
        vocab_size=49408 if is_full else 100,
        hidden_size=768 if is_full else 64,
        intermediate_size=3072 if is_full else 128,
        num_hidden_layers=12 if is_full else 2,
        num_attention_heads=12 if is_full else 4,
    )
    with torch.device("meta"):
        return T5EncoderModel(t5_config), CLIPTextModel(clip_config)


def vision_module(workload: Workload) -> SiglipVisionModel:
    """SigLIP's tower without values."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    is_full = workload.is_full_size
    config = SiglipVisionConfig(
        hidden_size=1152 if is_full else 48,
        intermediate_size=4304 if is_full else 96,
        num_hidden_layers=27 if is_full else 21,
        num_attention_heads=16 if is_full else 4,
        image_size=384 if is_full else 56,
        patch_size=14,
    )
    with torch.device("meta"):
        return SiglipVisionModel(config)


def autoencoder_module(workload: Workload) -> AutoencoderKL:
    """The autoencoder without values."""
    from diffusers import AutoencoderKL

    is_full = workload.is_full_size
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512) if is_full else (8, 8, 16, 16),
            layers_per_block=2 if is_full else 1,
            latent_channels=16,
            norm_num_groups=32 if is_full else 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
