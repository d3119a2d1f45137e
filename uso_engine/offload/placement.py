"""Where an engine's parts are: a memory plan for a configuration, and what carries it out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.offloadable_part import OffloadablePart
from uso_engine.conditioning.strips import Strips
from uso_engine.config import EngineConfig
from uso_engine.errors import MemoryBudgetError
from uso_engine.model.transformer import Transformer
from uso_engine.precision.tiers import TierName

from .autoencoder_sizes import FLUX_DECODER, FLUX_ENCODER, STRIP_PIXELS, Cut
from .budget import MemoryBudget, require_fit, transformer_sizes_of, usual_request_size
from .layer_stream import place_transformer
from .phases import GIB, row_bytes, table_bytes
from .plan import MemoryPlan, plan_memory
from .sizes import ComponentSizes, EngineSizes, RequestSize
from .streamed_part import StreamedPart

logger = logging.getLogger(__name__)

_ADVICE = {
    "content": "ask for a smaller content_long_side",
    "admission": "ask for fewer steps",
    "denoising": "ask for a smaller size, fewer references or shorter conditions",
}
"""What makes a phase smaller."""


class Placement:
    """A plan in force: modulation linears, blocks, encoders and autoencoder come to the device when they run.

    Args:
        plan: where everything is to be.
        usual: the request that it was made for.
        sizes: what the plan was made from.
        budget: what the plan keeps within.
        transformer: on the host, with its weights.
        parts: on the host; what the plan streams gets a new `running`.
        autoencoder: if there is one; what it moves while it decodes is counted too.
        device: where they run.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        usual: RequestSize,
        sizes: EngineSizes,
        *,
        budget: MemoryBudget,
        transformer: Transformer,
        parts: Sequence[OffloadablePart],
        autoencoder: Autoencoder | None,
        device: torch.device,
    ) -> None:
        self.plan, self.usual, self.sizes, self.budget = plan, usual, sizes, budget
        self._streams = place_transformer(transformer, plan, device)
        self._hosted: list[StreamedPart] = []
        self._parts, self._device = tuple(parts), device
        for part in parts:
            if part.name in plan.streamed:
                hosted = StreamedPart(part.modules, part.layers, device)
                part.running = hosted.running
                self._hosted.append(hosted)
            else:
                for module in part.modules:
                    module.to(device)
        self._autoencoder = autoencoder

    @property
    def moved_bytes(self) -> int:
        """Bytes moved between host and device so far."""
        streams = sum(stream.moved_bytes for stream in self._streams.values())
        decoding = 0 if self._autoencoder is None else self._autoencoder.moved_bytes
        return streams + decoding + sum(hosted.moved_bytes for hosted in self._hosted)

    def decoding(self, width: int, height: int, images: int) -> Cut:
        """How images of a size are to be decoded."""
        return self.plan.decoding_for(self.sizes, replace(self.usual, width=width, height=height, images=images))

    def require(self, work: RequestSize) -> None:
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

    def has_room(self, together: Sequence[RequestSize], step_rows: int) -> bool:
        """Whether requests keep within the budget that have begun together; those by themselves are checked by `require`.

        Args:
            together: at least one; each goes through its phases beside what the others hold.
            step_rows: packed rows that they share a step up to.
        """
        transformer, rows = self.sizes.transformer, sum(work.rows for work in together)
        tables = sum(table_bytes(transformer, work) for work in together)

        def peak(work: RequestSize) -> int:
            company = max(0, min(rows, step_rows) - work.rows) * row_bytes(transformer)
            alone = self.plan.peak_for(self.sizes, work).peak_bytes
            return alone + tables - table_bytes(transformer, work) + company

        return max(map(peak, together)) <= self.plan.budget_bytes

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

    def _fits(self, work: RequestSize, images: int) -> bool:
        return self.plan.peak_for(self.sizes, replace(work, images=images)).peak_bytes <= self.plan.budget_bytes


def carry_out(
    config: EngineConfig,
    tier: TierName,
    budget: MemoryBudget,
    *,
    transformer: Transformer,
    parts: Sequence[OffloadablePart],
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
        transformer_sizes_of(config, tier),
        {part.name: _component_sizes(part) for part in parts},
        FLUX_ENCODER.scaled(encoder),
        FLUX_DECODER.scaled(decoder),
        None if autoencoder is None else autoencoder.strip_pixels,
    )
    usual = usual_request_size(config)
    plan = plan_memory(budget.size_bytes, sizes, usual)
    require_fit(plan, config)
    logger.info("%s: %s", config.name, plan)
    return Placement(
        plan, usual, sizes, budget=budget, transformer=transformer, parts=parts, autoencoder=autoencoder, device=device
    )


def decoding_of(latents: Tensor, autoencoder: Autoencoder, placement: Placement | None) -> Cut:
    """How latents [n, 16, h / 8, w / 8] are decoded: as the placement or else the configuration says; small ones whole."""
    height, width = (autoencoder.downscale * side for side in latents.shape[-2:])
    if width * height <= (autoencoder.strip_pixels or STRIP_PIXELS):
        return "whole"
    if placement is not None:
        return placement.decoding(width, height, len(latents))
    return "whole" if autoencoder.strip_pixels is None else "strips"


def strips_of(cut: Cut, autoencoder: Autoencoder) -> Strips | None:
    """The strips that a way of decoding means; None for the whole."""
    return None if cut == "whole" else Strips(autoencoder.strip_pixels or STRIP_PIXELS, on_host=cut == "host strips")


def _component_sizes(part: OffloadablePart) -> ComponentSizes:
    def size(modules: Sequence[torch.nn.Module]) -> int:
        tensors = {id(tensor): tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]}
        return sum(tensor.nbytes for tensor in tensors.values())

    weights, layers = size(part.modules), [size([layer]) for layer in part.layers]
    return ComponentSizes(part.name, weights, weights - sum(layers), max(layers, default=0), part.working_bytes)


def release_cached_memory() -> None:
    """Give back what PyTorch's allocators keep of freed memory, the GPU's and the host's pinned."""
    torch.cuda.empty_cache()
    if hasattr(torch.accelerator, "empty_host_cache"):  # Older versions of torch keep pinned memory.
        torch.accelerator.empty_host_cache()
