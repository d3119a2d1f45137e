"""The stages around the denoising loop, with encoders of full size and random weights made on the device."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.encoders import autoencoder_module, encoder_sizes, filled, text_modules, vision_module
from benchmarks.measure import interleave
from benchmarks.workload import Workload, conditions, random_inputs, random_transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule
from uso_engine.verification.measure import relative_error


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


def text_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """T5 of 512 tokens and CLIP of 77."""
    text_encoder, pooled_encoder = (filled(module, device, dtype) for module in text_modules(encoder_sizes(workload)))
    t5_ids = torch.randint(0, 99, (1, workload.text), device=device)
    clip_ids = torch.randint(0, 99, (1, 77), device=device)
    yield Stage("t5", lambda: text_encoder(t5_ids))
    yield Stage("clip", lambda: pooled_encoder(clip_ids))


def style_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """SigLIP in float32, as the authors run it."""
    vision = filled(vision_module(encoder_sizes(workload)), device, torch.float32)
    side = 384 if workload.is_full_size else 56
    pixels = torch.randn(1, 3, side, side, device=device)
    yield Stage("siglip", lambda: vision(pixels, output_hidden_states=True))


def autoencoder_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """Encoding a content image in float32; decoding in float32, and in bfloat16 with channels last."""
    module = autoencoder_module(encoder_sizes(workload))
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
        error = relative_error(half.decode(half_latent).sample, reference)
        yield Stage("autoencoder decode bfloat16, channels last", lambda: half.decode(half_latent), error)


def denoising_stages(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[Stage]:
    """Admission, and all denoising steps of one image."""
    transformer = random_transformer(workload.params, device, dtype)
    inputs = random_inputs(workload, device, dtype)
    rows, columns = workload.grid
    sigmas = schedule(workload.steps, 16 * columns, 16 * rows)
    sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
    noise = torch.randn(16, 2 * rows, 2 * columns)

    def denoise() -> None:
        DenoisingRun(transformer, [ImageJob(sequence, noise, tuple(sigmas))]).run()

    yield Stage("admission", lambda: admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance))
    yield Stage(f"denoising, {workload.steps} steps", denoise)
