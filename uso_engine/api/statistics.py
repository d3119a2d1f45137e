"""Counts of an engine since it was loaded, for metrics and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uso_engine.conditioning.cache_statistics import CacheStatistics
    from uso_engine.sampling.graph_statistics import GraphStatistics


@dataclass(frozen=True)
class EngineStatistics:
    """What an engine has done and holds, at one moment.

    Args:
        queued: requests that are accepted and have not taken a step.
        running: requests that have taken a step and have not ended.
        queued_bytes: of opened pictures and given tensors that requests hold.
        steps: denoising steps taken, each of one or more requests.
        tokens: transformer tokens, summed over the steps.
        tokens_in_step: tokens of the last step.
        requests_in_step: requests of the last step.
        occupancy: mean requests of a step; 0 before the first.
        batches_formed: steps that had to form their batch anew.
        lora_switches: times that other LoRAs were merged.
        memory_retries: steps that were taken again in smaller company because memory ran out.
        outcomes: how many requests ended how: ``done``, ``failed``, ``cancelled``, ``timed_out``, ``refused``.
        caches: of prompts, style images and content images.
        graphs: steps as CUDA graphs.
    """

    queued: int
    running: int
    queued_bytes: int
    steps: int
    tokens: int
    tokens_in_step: int
    requests_in_step: int
    occupancy: float
    batches_formed: int
    lora_switches: int
    memory_retries: int
    outcomes: Mapping[str, int]
    caches: Mapping[str, CacheStatistics]
    graphs: GraphStatistics
