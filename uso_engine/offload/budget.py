"""How much GPU memory an engine may use: the setting, what a GPU has, and whether an engine can keep within it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from numbers import Real
from typing import cast

import torch

from uso_engine.config import EngineConfig
from uso_engine.errors import MemoryBudgetError
from uso_engine.precision.tiers import TIERS, Format, TierName
from uso_engine.precision.transformer import DTYPES, layer_formats

from .autoencoder_sizes import CoderSizes
from .phases import GIB, RESERVE_BYTES
from .plan import MemoryPlan, plan_memory
from .sizes import EngineSizes, RequestSize, TransformerSizes, public_engine_sizes, transformer_sizes

logger = logging.getLogger(__name__)

SMALLEST_BUDGET_GIB, LARGEST_BUDGET_GIB = 0.001, 1e6


@dataclass(frozen=True)
class MemoryBudget:
    """GPU memory that a plan has to keep within.

    Args:
        size_bytes: all of the process's.
        binding: whether it was set, so that requests that would exceed it are refused; otherwise it is what the GPU had free,
            and a request may try.
    """

    size_bytes: int
    binding: bool


def formats_of(config: EngineConfig, tier: TierName) -> dict[str, Format]:
    """The format of every matrix that a configuration's precision asks for."""
    precision = config.precision
    return layer_formats(config.transformer.params, tier, keep=precision.keep, int8_activations=precision.int8_activations)


def budget_bytes(gib: object, name: str) -> int:
    """A budget in bytes.

    Raises:
        ValueError: not a number of GiB that a machine could have; says under which name it was given.
    """
    number = cast("float", gib)  # Numpy's too, which is what the check says.
    if isinstance(gib, bool) or not isinstance(gib, Real) or not SMALLEST_BUDGET_GIB <= number <= LARGEST_BUDGET_GIB:
        raise ValueError(f"{name} must be a number of GiB from {SMALLEST_BUDGET_GIB:g} to {LARGEST_BUDGET_GIB:g}, got {gib!r}")
    return int(float(number) * GIB)


BUDGET_OF_SEVERAL = "a memory budget and [parallel] ulysses exclude each other: every process holds all weights"


def find_budget(config: EngineConfig, tier: TierName, device: torch.device, asked_gib: float | None) -> MemoryBudget | None:
    """What a plan has to keep within; None where everything has room and needs no plan.

    Args:
        config: of the engine.
        tier: of its transformer.
        device: where it is to run.
        asked_gib: ``memory_budget_gib``, if it is set. Otherwise the budget is what the GPU has free; on a CPU there is none.

    Raises:
        ValueError: a budget that is no number of GiB.
        MemoryBudgetError: not even the transformer can be streamed within the budget, or several processes compute together,
            each of which holds all weights.
    """
    if config.parallel.ulysses > 1:
        if asked_gib is not None:
            raise MemoryBudgetError(BUDGET_OF_SEVERAL)
        return None
    if asked_gib is not None:
        budget = budget_bytes(asked_gib, "memory_budget_gib")
        _require_room(budget, device)
        # Known without loading anything; the parts around the transformer are measured once they are loaded.
        alone = EngineSizes(transformer_sizes_of(config, tier), {}, CoderSizes(), CoderSizes())
        require_fit(plan_memory(budget, alone, usual_request_size(config)), config)
        return MemoryBudget(budget, binding=True)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    public = public_sizes(config, tier)
    plan = plan_memory(free, public, usual_request_size(config))
    everything_stays = not plan.streamed and not plan.streamed_double_blocks and not plan.streamed_single_blocks
    if plan.fits and everything_stays and plan.decoding == "whole":
        return None
    held = total - free - torch.cuda.memory_reserved(device)
    logger.warning(
        "%s: not all of it finds room in the %.2f GiB that %s has free of %.2f (%.2f are held by other processes): what does "
        "not comes from the host when it runs, which is slower",
        config.name,
        free / GIB,
        device,
        total / GIB,
        held / GIB,
    )
    return MemoryBudget(free, binding=False)


def usual_request_size(config: EngineConfig) -> RequestSize:
    """What an engine is planned for: one image of the default size with one content and one style image."""
    has_style, has_content = config.projector is not None, config.autoencoder is not None
    return RequestSize(
        width=config.defaults.width,
        height=config.defaults.height,
        steps=config.defaults.steps,
        text_tokens=512 if config.t5 is None else config.t5.max_length,
        contents=int(has_content),
        content_side=config.content.long_side,
        styles=int(has_style),
        style_tokens=0 if config.projector is None else 3 * config.projector.style_tokens,
    )


def public_sizes(config: EngineConfig, tier: TierName) -> EngineSizes:
    """Sizes of a configuration's transformer and of the public models around it, before anything is loaded."""
    formats, dtype = _form_of(config, tier)
    return public_engine_sizes(config.transformer.params, formats, text_encoder=config.precision.text_encoder, dtype=dtype)


def transformer_sizes_of(config: EngineConfig, tier: TierName) -> TransformerSizes:
    """Sizes of a configuration's transformer in a tier."""
    formats, dtype = _form_of(config, tier)
    return transformer_sizes(config.transformer.params, formats, dtype=dtype)


def require_fit(plan: MemoryPlan, config: EngineConfig) -> None:
    """Check that a plan fits.

    Raises:
        MemoryBudgetError: it does not; says what needs how much.
    """
    if not plan.fits:
        budget = plan.budget_bytes / GIB
        raise MemoryBudgetError(f"{config.name} does not fit into {budget:g} GiB: " + "; ".join(plan.problems))


def _require_room(size_bytes: int, device: torch.device) -> None:
    """A budget is for all of the process; the CUDA context, part of what is kept free, is taken already."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    here = free + torch.cuda.memory_reserved(device)
    if size_bytes - RESERVE_BYTES > here:
        raise MemoryBudgetError(
            f"memory_budget_gib is {size_bytes / GIB:g}, but {device} has {here / GIB:.2f} GiB free, "
            f"{(total - here) / GIB:.2f} are held by other processes"
        )


def _form_of(config: EngineConfig, tier: TierName) -> tuple[dict[str, Format], torch.dtype]:
    """What becomes of the transformer's matrices, and the type of the rest."""
    return formats_of(config, tier), DTYPES[TIERS[tier].dtype]
