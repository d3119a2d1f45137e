"""Two engines of one configuration: everything resident, and everything streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from uso_engine import USOEngine, load_config
from uso_engine.config import EngineConfig, PrecisionConfig
from uso_engine.offload.phases import MODULATION, Choice, moved_bytes_of
from uso_engine.offload.plan import MemoryPlan, plan_memory
from uso_engine.offload.sizes import EngineSizes, RequestSize


def config_of(tier: str) -> EngineConfig:
    """The embedded model in a tier."""
    loaded = load_config("uso-tiny")
    precision = PrecisionConfig.model_validate({**loaded.precision.model_dump(), "tier": tier})
    return loaded.model_copy(update={"precision": precision})


def everything_streamed(budget_bytes: int, sizes: EngineSizes, work: RequestSize) -> MemoryPlan:
    """A plan such as a tiny budget would need for a large model: uso-tiny's own parts are smaller than what they compute."""
    parts = {name: part.weight_bytes for name, part in sizes.components.items()}
    blocks = range(len(sizes.transformer.single_blocks) - 1)
    choice = Choice(frozenset({MODULATION, *parts}), (0, 1), tuple(blocks))
    return replace(
        plan_memory(budget_bytes, sizes, work),
        streamed={**parts, MODULATION: sum(sizes.transformer.modulation)},
        streamed_double_blocks=choice.double_blocks,
        streamed_single_blocks=choice.single_blocks,
        moved_bytes=moved_bytes_of(choice, sizes, work),
    )


@contextmanager
def plain_and_streamed(tier: str, device: str) -> Iterator[tuple[USOEngine, USOEngine]]:
    """The engine without a plan, and the one that streams."""
    config = config_of(tier)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uso_engine.offload.placement.plan_memory", everything_streamed)
        planned = USOEngine.from_config(config, device=device, memory_budget_gib=4)
    with planned, USOEngine.from_config(config, device=device) as plain:
        yield plain, planned
