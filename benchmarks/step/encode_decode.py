"""The stages around the denoising loop, with encoders of full size and random weights made on the device."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from benchmarks.measure import interleave
from benchmarks.workload import Workload, conditions, random_inputs, random_transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.denoiser import Denoiser, ImageJob
from uso_engine.sampling.schedule import schedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, SiglipVisionModel, T5EncoderModel


class Stage(NamedTuple):
    """A stage: its name, what runs it, and how far its answer is from float32's where that is not its own type."""

    name: str
    run: Callable[[], object]
    difference: float | None = None


def time_stages(workload: Workload, device: torch.device, dtype: torch.dtype, rounds: int = 3) -> Iterator[dict[str, object]]:
    """A record for each of encoding, admission, denoising (all steps) and decoding, each measured apart.

    Full-size workloads get full-size encoders; others get encoders of a thousandth.
    """
    for make in (text_stages, style_stages, autoencoder_stages, denoising_stages):
        for stage in make(workload, device, dtype):
            with torch.no_grad():
                timing = interleave({stage.name: stage.run}, rounds=rounds, device=device)[stage.name]
            yield {
                "workload": workload.name,
                "device": device.type,
                "dtype": str(dtype).removeprefix("torch."),
                "stage": stage.name,
                "difference": stage.difference,
                **timing,
            }
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


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

    is_full = workload.name == "full"
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

    is_full = workload.name == "full"
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

    is_full = workload.name == "full"
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


def text_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """T5 of 512 tokens and CLIP of 77."""
    text_encoder, pooled_encoder = (filled(module, device, dtype) for module in text_modules(workload))
    t5_ids = torch.randint(0, 99, (1, workload.text), device=device)
    clip_ids = torch.randint(0, 99, (1, 77), device=device)
    yield Stage("t5", lambda: text_encoder(t5_ids))
    yield Stage("clip", lambda: pooled_encoder(clip_ids))


def style_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """SigLIP in float32, as the authors run it."""
    vision = filled(vision_module(workload), device, torch.float32)
    side = 384 if workload.name == "full" else 56
    pixels = torch.randn(1, 3, side, side, device=device)
    yield Stage("siglip", lambda: vision(pixels, output_hidden_states=True))


def autoencoder_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """Encoding a content image in float32; decoding in float32, and in bfloat16 with channels last."""
    module = autoencoder_module(workload)
    filled(module, device, torch.float32)
    rows, columns = workload.grid
    latent = torch.randn(1, 16, 2 * rows, 2 * columns, device=device)
    if math.prod(workload.content):
        pixels = torch.rand(1, 3, 16 * workload.content[0], 16 * workload.content[1], device=device) * 2 - 1
        yield Stage("autoencoder encode", lambda: module.encode(pixels))
    yield Stage("autoencoder decode float32", lambda: module.decode(latent))
    if dtype == torch.bfloat16 and device.type == "cuda":
        reference = module.decode(latent).sample
        half = module.to(dtype=dtype, memory_format=torch.channels_last)
        half_latent = latent.to(dtype).contiguous(memory_format=torch.channels_last)
        error = (half.decode(half_latent).sample.float() - reference).norm() / reference.norm()
        yield Stage("autoencoder decode bfloat16, channels last", lambda: half.decode(half_latent), float(error))


def denoising_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """Admission, and all denoising steps of one image."""
    transformer = random_transformer(workload.params, device, dtype)
    inputs = random_inputs(workload, device, dtype)
    rows, columns = workload.grid
    sigmas = schedule(workload.steps, 16 * columns, 16 * rows)
    sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
    noise = torch.randn(16, 2 * rows, 2 * columns)

    def denoise() -> None:
        Denoiser(transformer, [ImageJob(sequence, noise, tuple(sigmas))]).run()

    yield Stage("admission", lambda: admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance))
    yield Stage(f"denoising, {workload.steps} steps", denoise)
