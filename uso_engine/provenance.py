"""A request's result: the images, what made them as plain JSON, and what its caller should know about them.

The record holds whatever changes a picture: the request, the seed, the configuration's settings, tier, LoRAs, attention,
research options, and hashes of what is no JSON (pictures, latents, embeddings).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uso_kernels.launch import TRITON_MISSING

from .api.research import ResearchOptions
from .api.result import GenerationResult
from .conditioning.cache import hash_image, hash_tensor
from .config import EngineConfig
from .weights.lora.low_rank import FileName

if TYPE_CHECKING:
    from PIL.Image import Image

    from .api.request import GenerationRequest
    from .generated import Generated
    from .pipeline import Pipeline

logger = logging.getLogger(__name__)

# They say how an engine is run, not what its pictures look like; those that do are in the record by other names.
_SETTINGS_WITHOUT_EFFECT = {"name", "description", "demonstration", "model_name", "loras"}
_SETTINGS_WITHOUT_EFFECT |= {"memory_budget_gib", "defaults", "limits", "cache", "queue", "sampling", "quality"}


def result_of(
    config: EngineConfig,
    pipeline: Pipeline,
    request: GenerationRequest,
    options: ResearchOptions,
    made: Generated,
    *,
    seeds: Sequence[int],
    images: Sequence[Image],
    flags: Sequence[bool],
    seconds: Mapping[str, float],
) -> GenerationResult:
    """Put a request's result together.

    Args:
        config: the engine's.
        pipeline: the engine's, as it ran.
        request: with its seed.
        options: of the request.
        made: what came out.
        seeds: one per image.
        images: as the safety checker left them.
        flags: whether it objected, one per image.
        seconds: of each stage.
    """
    assert request.seed is not None
    width, height = made.size
    warnings = warnings_of(made)
    log_warnings(warnings)
    return GenerationResult(
        images=tuple(images),
        seed=request.seed,
        seeds=tuple(seeds),
        has_nsfw_concepts=tuple(flags),
        prompt=request.prompt,
        width=width,
        height=height,
        timings=seconds,
        tokens_used=made.denoised.tokens,
        parameters=describe(config, pipeline, request, options, made),
        output_format=request.output_format,
        sync_mode=request.sync_mode,
        model=config.model_name,
        attention=made.denoised.attention,
        warnings=warnings,
        latents=None if any(flags) else made.denoised.latents,
    )


def describe(
    config: EngineConfig, pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions, made: Generated
) -> dict[str, object]:
    """Describe what made a request's images.

    Args:
        config: the engine's.
        pipeline: the engine's, as it ran.
        request: with its seed.
        options: of the request.
        made: what came out.

    Returns:
        Names and values, plain JSON.
    """
    assert request.seed is not None
    width, height = made.size
    record = request.parameters(seed=request.seed, width=width, height=height)
    if options.sigmas is not None:
        record |= {"num_inference_steps": len(options.sigmas) - 1, "sigmas": [float(sigma) for sigma in options.sigmas]}
    record |= {
        "steps_taken": made.denoised.steps,
        "enable_safety_checker": request.enable_safety_checker,
        "config": config.name,
        "tier": pipeline.loaded.tier,
        "loras": [_lora(name, weight) for name, weight in made.loras],
        "attention": list(made.denoised.attention),
        "kernels": kernels_of(pipeline),
        "decoding": pipeline.decoding(made.denoised.latents),
        "device": pipeline.transformer.img_in.weight.device.type,
        "versions": {name: _version(name) for name in ("uso-engine", "torch")},
        "settings": config.model_dump(mode="json", exclude=_SETTINGS_WITHOUT_EFFECT, exclude_defaults=True),
        "images": {
            "content": [hash_image(image) for image in made.pictures.contents],
            "style": [hash_tensor(pixels) for pixels in made.pictures.styles],
        },
    }
    return record | made.sampling.record() | _text_rows(made) | _research(options, made)


def _text_rows(made: Generated) -> dict[str, object]:
    """What became of prompts' padding, where not every row was computed."""
    if not made.merged:
        return {}
    record: dict[str, object] = {"text_padding": "merge", "text_rows": made.merged[0].record()}
    return record if len(made.merged) < 2 else record | {"negative_text_rows": made.merged[1].record()}


def _lora(name: str, weight: float) -> dict[str, object]:
    """A LoRA by what it is anywhere: its path in the configuration, or its file's name, and the hash of its contents."""
    path = Path(name).name if Path(name).is_absolute() else name
    record: dict[str, object] = {"path": path, "weight": weight}
    return record | ({"sha256": name.sha256} if isinstance(name, FileName) else {})


def _research(options: ResearchOptions, made: Generated) -> dict[str, object]:
    """What the research options add, and what a caller did between steps."""
    record: dict[str, object] = {}
    if options.strength is not None:
        record["strength"] = options.strength
    if options.alpha != "white":
        record["alpha"] = options.alpha
    if options.latents is not None:
        record["latents"] = hash_tensor(torch.as_tensor(options.latents))
    if options.prompt_embedding is not None:
        record["prompt_embedding"] = hash_tensor(made.text.tokens, hash_tensor(made.text.pooled))
    if made.saved_styles:
        record["style_tokens"] = [hash_tensor(style.tokens) for style in made.saved_styles]
    if options.position_offset is not None:
        record["position_offset"] = options.position_offset
    if options.posterior_seed is not None:
        record["posterior_seed"] = int(options.posterior_seed)
    if options.reference_numerics:
        record["reference_numerics"] = True
    if made.latents_changed:
        record["latents_changed_by_on_step"] = True
    return record


def kernels_of(pipeline: Pipeline) -> str:
    """Which implementation of the kernels computes: "triton" on a GPU, "reference" (plain PyTorch) elsewhere."""
    return "triton" if TRITON_MISSING is None and pipeline.transformer.img_in.weight.device.type == "cuda" else "reference"


def warnings_of(made: Generated) -> tuple[str, ...]:
    """What a request's caller should know, each once."""
    against = () if made.negative_text is None else made.negative_text.warnings("the negative prompt")
    return tuple(dict.fromkeys((*made.text.warnings(), *against)))


def log_warnings(warnings: Sequence[str]) -> None:
    """Log what a result says too; the records are marked, so that whoever shows a result's warnings can leave them out."""
    for warning in warnings:
        logger.warning("%s", warning, extra={"in_result": True})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
