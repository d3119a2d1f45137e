"""Every way that can be compared on a device, and why each of the others is not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Clock
from benchmarks.tiers.steps import with_8_bit_activations
from uso_engine.model.params import TransformerParams
from uso_engine.precision.tiers import tiers_of_gpu

from .authors import AuthorsCode, RenderedAuthors
from .diffusers_way import DiffusersWay
from .engine import EngineWay
from .evaluations import Evaluations
from .models import Models
from .way import Way

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Of a way's first velocity from the engine's: rounding of the type, and LoRA rounded into the weights."""
CODE_TOLERANCE = {**TOLERANCE, torch.float32: 1e-4}
"""Of the authors' own code: it takes float32's `exp` for the frequencies of time and guidance, the engine float64's."""
REFERENCE = "USO_REFERENCE_DIR"
Make = Callable[[], Way]

WITHOUT_STYLE_TOKENS = {
    "sglang": "its diffusion pipelines of FLUX.1 take a prompt, Kontext's one picture; neither takes style tokens",
    "vllm-omni": "the same pipelines of FLUX.1; no place for style tokens or for content tokens at USO's positions",
    "xfuser": "parallelises diffusers' pipelines, which have no USO",
    "cache-dit": "skips blocks of diffusers' pipelines, which is lossy; its lossless part is diffusers compiled",
    "para-attn": "parallelises and caches diffusers' pipelines; no release since July 2025",
    "nunchaku": "the package of this name in the registry is another project",
    "fluxbfl": "FLUX.1 without reference tokens",
}
"""Engines in the package registry that run FLUX.1, looked at in November 2026, and why none of them answers these requests."""


def ways(models: Models, clock: Clock, *, compiles: bool, tiers: tuple[str, ...]) -> tuple[dict[str, Make], dict[str, str]]:
    """What makes each way, by name, the engine in the models' own type first; and reasons by the names of the others.

    Args:
        models: the shared ones.
        clock: of a CPU.
        compiles: whether compiled code is compared.
        tiers: further tiers of the engine.
    """
    tolerance = TOLERANCE[models.dtype]

    def watched() -> Evaluations:
        return Evaluations(models.device, clock)

    made: dict[str, Make] = {"ours": lambda: EngineWay(models, watched(), largest_difference=tolerance)}
    for tier in tiers:
        made[f"ours, {tier}"] = lambda tier=tier: EngineWay(models, watched(), tier, largest_difference=tolerance)  # type: ignore[misc]
    made["authors' way"] = lambda: RenderedAuthors(models, watched(), largest_difference=tolerance)
    reasons: dict[str, str] = {}
    refused = refused_by_diffusers(models.size.params)
    if refused is None:
        made["diffusers"] = lambda: DiffusersWay(models, watched(), largest_difference=tolerance)
    else:
        reasons["diffusers"] = refused
    if refused is not None:
        reasons["diffusers, compiled"] = refused
    elif compiles:
        made["diffusers, compiled"] = lambda: DiffusersWay(models, watched(), largest_difference=tolerance, compiled=True)
    else:
        reasons["diffusers, compiled"] = "on a CPU compiling takes minutes: --compile asks for it"
    if (reason := missing_reference()) is None:
        folder = Path(os.environ[REFERENCE])
        allowed = CODE_TOLERANCE[models.dtype]
        made["authors' code"] = lambda: AuthorsCode(models, watched(), largest_difference=allowed, folder=folder)
    else:
        reasons["authors' code"] = reason
    if (reason := refused or missing_fp8(models.device)) is None:
        made["diffusers, torchao fp8, compiled"] = lambda: DiffusersWay(
            models, watched(), largest_difference=0.5, compiled=compiles, prepare=partial(quantize_fp8), suffix=", torchao fp8"
        )
    else:
        reasons["diffusers, torchao fp8, compiled"] = reason
    return made, {**reasons, **WITHOUT_STYLE_TOKENS}


def default_tiers(device: torch.device) -> tuple[str, ...]:
    """The tiers that can be faster than bf16 on a device; none on a CPU."""
    if device.type != "cuda":
        return ()
    able = tiers_of_gpu(torch.cuda.get_device_capability(device))
    return tuple(name for name in with_8_bit_activations() if name.partition(",")[0] in able)


def missing_reference() -> str | None:
    """Why the authors' own code cannot run, or None."""
    folder = os.environ.get(REFERENCE)
    if not folder:
        return f"{REFERENCE} names no checkout of it"
    if not (Path(folder) / "uso" / "flux" / "model.py").is_file():
        return f"{REFERENCE}: expected uso/flux/model.py in {folder}"
    return None if importlib.util.find_spec("einops") else "it needs the package einops"


def refused_by_diffusers(params: TransformerParams) -> str | None:
    """Why diffusers' transformer cannot be of these sizes, or None."""
    times = params.mlp_width / params.hidden_size
    return None if times == 4 else f"its MLP is 4 times as wide as the model, this one's {times:g} times"


def missing_fp8(device: torch.device) -> str | None:
    """Why torchao cannot multiply in fp8 here, or None."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if device.type != "cuda":
        return "it multiplies in fp8 on a GPU only"
    found = torch.cuda.get_device_capability(device)
    return None if found >= (8, 9) else f"needs compute capability 8.9, this GPU has {found[0]}.{found[1]}"


def quantize_fp8(module: nn.Module) -> None:
    """Quantise the blocks' matrices by rows, activations while they come."""
    ao: Any = importlib.import_module("torchao.quantization")
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    ao.quantize_(module, config, filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "transformer_blocks" in name)
