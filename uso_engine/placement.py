"""Where an engine's parts are: a memory plan for a configuration, and what carries it out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from .conditioning.content import Autoencoder
from .conditioning.movable_part import MovablePart
from .config import EngineConfig, Tier
from .errors import MemoryBudgetError
from .model.transformer import Transformer
from .quantization.engine_sizes import (
    AUTOENCODER_DECODE_BYTES_PER_PIXEL,
    AUTOENCODER_ENCODE_BYTES_PER_PIXEL,
    ComponentSizes,
    EngineSizes,
    TransformerSizes,
    Workload,
    engine_sizes,
    transformer_sizes,
)
from .quantization.hosted_part import HostedPart
from .quantization.layer_stream import place_transformer
from .quantization.memory_phases import GIB, RESERVE_BYTES, budget_bytes
from .quantization.memory_plan import MemoryPlan, plan_memory
from .transformer_loading import FLOAT_TIERS, kinds_of

logger = logging.getLogger(__name__)


_ADVICE = {
    "content": "ask for a smaller content_long_side",
    "admission": "ask for fewer steps",
    "denoising": "ask for a smaller size, fewer references or shorter conditions",
}
"""What makes a phase smaller."""


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


class Placement:
    """A plan in force: modulation linears, blocks, encoders and autoencoder come to the device when they run.

    Args:
        plan: where everything is to be.
        usual: the workload that it was made for.
        sizes: what the plan was made from.
        budget: what the plan keeps within.
        transformer: on the host, with its weights.
        parts: on the host; what the plan streams gets a new `running`.
        autoencoder: which decodes in the plan's tiles, or in smaller ones that the configuration names.
        device: where they run.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        usual: Workload,
        sizes: EngineSizes,
        *,
        budget: MemoryBudget,
        transformer: Transformer,
        parts: Sequence[MovablePart],
        autoencoder: Autoencoder | None,
        device: torch.device,
    ) -> None:
        self.plan, self.usual, self.sizes, self.budget = plan, usual, sizes, budget
        self._streams = place_transformer(transformer, plan, device)
        self._hosted: list[HostedPart] = []
        self._parts, self._device = tuple(parts), device
        for part in parts:
            if part.name in plan.streamed:
                hosted = HostedPart(part.modules, part.layers, device)
                part.running = hosted.running
                self._hosted.append(hosted)
            else:
                for module in part.modules:
                    module.to(device)
        if autoencoder is not None and plan.tile_side is not None:
            autoencoder.decode_in_tiles(plan.tile_side)

    @property
    def moved_bytes(self) -> int:
        """Bytes brought to the device so far."""
        streams = sum(stream.moved_bytes for stream in self._streams.values())
        return streams + sum(hosted.moved_bytes for hosted in self._hosted)

    def require(self, work: Workload) -> None:
        """Check that a request stays within the budget, before anything of it runs.

        Raises:
            MemoryBudgetError: it would not; says what needs how much, and how many images would fit.
        """
        if not self.budget.binding:
            return
        peak = self.plan.peak_for(self.sizes, work)
        if peak.peak_bytes <= self.plan.budget_bytes:
            return
        fewer = [count for count in range(1, work.images) if self._fits(work, count)]
        advice = f"{max(fewer)} at a time would fit" if fewer else _ADVICE.get(peak.name, "ask for a smaller size")
        raise MemoryBudgetError(
            f"{work.images} x {work.width}x{work.height} with {work.contents} content and {work.styles} style images needs "
            f"{peak.peak_bytes / GIB:.2f} GiB ({peak.name}), memory_budget_gib is {self.plan.budget_bytes / GIB:g}; {advice}"
        )

    def end_denoising(self) -> None:
        """Let go of the buffers through which modulation linears and blocks are streamed."""
        for stream in self._streams.values():
            stream.release()
        if self._streams and self._device.type == "cuda":
            # What the allocator keeps of them would stand in the way of the autoencoder.
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Stop bringing anything; the parts stay where they are."""
        for stream in self._streams.values():
            stream.remove()
        for hosted in self._hosted:
            hosted.remove()
        for part in self._parts:
            part.running = nullcontext
        self._streams, self._hosted, self._parts = {}, [], ()

    def take_over_weights(self) -> None:
        """Let changed weights (other LoRAs) be the ones that are streamed."""
        for stream in self._streams.values():
            stream.take_over()

    def _fits(self, work: Workload, images: int) -> bool:
        return self.plan.peak_for(self.sizes, replace(work, images=images)).peak_bytes <= self.plan.budget_bytes


def find_budget(config: EngineConfig, tier: Tier, device: torch.device, asked_gib: float | None) -> MemoryBudget | None:
    """What a plan has to keep within; None where everything has room and needs no plan.

    Args:
        config: of the engine.
        tier: of its transformer.
        device: where it is to run.
        asked_gib: ``memory_budget_gib``, if it is set. Otherwise the budget is what the GPU has free; on a CPU there is none.

    Raises:
        ValueError: a budget that is not positive.
        MemoryBudgetError: not even the transformer can be streamed within the budget.
    """
    if asked_gib is not None:
        budget = budget_bytes(asked_gib, "memory_budget_gib")
        _require_room(budget, device)
        # Known without loading anything; the parts around the transformer are measured once they are loaded.
        alone = EngineSizes(_transformer_sizes(config, tier), {}, 0, 0)
        _require_fit(plan_memory(budget, alone, usual_workload(config)), config)
        return MemoryBudget(budget, binding=True)
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    public = public_sizes(config, tier)
    plan = plan_memory(free, public, usual_workload(config))
    everything_stays = not plan.streamed and not plan.streamed_double_blocks and not plan.streamed_single_blocks
    return None if plan.fits and everything_stays and plan.tile_side is None else MemoryBudget(free, binding=False)


def place(
    config: EngineConfig,
    tier: Tier,
    budget: MemoryBudget,
    *,
    transformer: Transformer,
    parts: Sequence[MovablePart],
    autoencoder: Autoencoder | None,
    device: torch.device,
) -> Placement:
    """Plan for loaded parts and carry it out.

    Args:
        config: of the engine.
        tier: of its transformer.
        budget: what to keep within.
        transformer: on the host, with its weights.
        parts: everything else, the autoencoder's part among them, on the host.
        autoencoder: if there is one.
        device: where they are to run.

    Raises:
        MemoryBudgetError: there is no plan within the budget; says what needs how much.
    """
    encoder, decoder = (0.0, 0.0) if autoencoder is None else autoencoder.relative_working_size
    sizes = EngineSizes(
        _transformer_sizes(config, tier),
        {part.name: _component_sizes(part) for part in parts},
        encoder * AUTOENCODER_ENCODE_BYTES_PER_PIXEL,
        decoder * AUTOENCODER_DECODE_BYTES_PER_PIXEL,
        None if autoencoder is None else autoencoder.tile_side,
    )
    usual = usual_workload(config)
    plan = plan_memory(budget.size_bytes, sizes, usual)
    _require_fit(plan, config)
    logger.info("%s: %s", config.name, plan)
    return Placement(
        plan, usual, sizes, budget=budget, transformer=transformer, parts=parts, autoencoder=autoencoder, device=device
    )


def usual_workload(config: EngineConfig) -> Workload:
    """What an engine is planned for: one image of the default size with one content and one style image."""
    has_style, has_content = config.projector is not None, config.autoencoder is not None
    return Workload(
        width=config.defaults.width,
        height=config.defaults.height,
        steps=config.defaults.steps,
        text_tokens=512 if config.t5 is None else config.t5.max_length,
        contents=int(has_content),
        content_side=config.content.long_side,
        styles=int(has_style),
        style_tokens=0 if config.projector is None else 3 * config.projector.style_tokens,
    )


def public_sizes(config: EngineConfig, tier: Tier) -> EngineSizes:
    """Sizes of a configuration's transformer and of the public models around it, before anything is loaded."""
    return engine_sizes(
        config.transformer.params,
        {} if tier == "float32" or tier == "bf16" else kinds_of(config, tier),
        text_encoder=config.precision.text_encoder,
        dtype=FLOAT_TIERS.get(tier, torch.bfloat16),
    )


def _transformer_sizes(config: EngineConfig, tier: Tier) -> TransformerSizes:
    if tier == "float32" or tier == "bf16":
        return transformer_sizes(config.transformer.params, {}, dtype=FLOAT_TIERS[tier])
    return transformer_sizes(config.transformer.params, kinds_of(config, tier))


def _component_sizes(part: MovablePart) -> ComponentSizes:
    def size(modules: Sequence[torch.nn.Module]) -> int:
        tensors = {id(tensor): tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]}
        return sum(tensor.nbytes for tensor in tensors.values())

    weights, layers = size(part.modules), [size([layer]) for layer in part.layers]
    return ComponentSizes(part.name, weights, weights - sum(layers), max(layers, default=0), part.working_bytes)


def _require_room(budget_bytes: int, device: torch.device) -> None:
    """A budget is for all of the process; the CUDA context, part of what is kept free, is taken already."""
    if device.type != "cuda":
        return
    here = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if budget_bytes - RESERVE_BYTES > here:
        raise MemoryBudgetError(f"memory_budget_gib is {budget_bytes / GIB:g}, but {device} has {here / GIB:.2f} GiB free")


def _require_fit(plan: MemoryPlan, config: EngineConfig) -> None:
    if not plan.fits:
        budget = plan.budget_bytes / GIB
        raise MemoryBudgetError(f"{config.name} does not fit into {budget:g} GiB: " + "; ".join(plan.problems))
