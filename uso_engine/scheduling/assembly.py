"""The threads of an engine, put together."""

from __future__ import annotations

import time
from collections.abc import Callable

from uso_engine.api.statistics import EngineStatistics
from uso_engine.generation import LoadedParts
from uso_engine.loading.lora_choice import ChosenLoRAs
from uso_engine.queue_limits import QueueLimits
from uso_engine.sampling.step_graphs import MIB, StepGraphs
from uso_kernels.launch import numbered

from .counters import Counters
from .loop import RequestLoop
from .machine import PipelineMachine
from .queue import RequestQueue
from .room import room_of
from .scheduler import Scheduler
from .threads import hand_over


def make_loop(
    parts: LoadedParts,
    *,
    limits: QueueLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
    threaded: bool = True,
) -> RequestLoop:
    """What takes requests through an engine's parts; no thread runs before the first one comes.

    Args:
        parts: of the engine.
        limits: of its queue, instead of the configuration's.
        clock: seconds that never go back.
        threaded: whether threads do it; otherwise whoever calls `RequestLoop.round`.
    """
    limits, placement = limits or parts.config.queue, parts.pipeline.placement
    scheduler = Scheduler(
        limits.max_step_tokens,
        limits.lora_patience_s,
        loras=ChosenLoRAs(),
        fits=room_of(placement, limits.max_step_tokens, lambda: queue.decoding),
    )
    queue = RequestQueue(parts.config.name, limits, scheduler, Counters(), clock)
    graphs = StepGraphs(
        parts.pipeline.transformer,
        parts.config.cuda_graphs,
        limit_bytes=int(parts.config.cuda_graph_mib * MIB),
        has_plan=placement is not None,
    )
    device, machine = numbered(parts.device), PipelineMachine(parts.pipeline, graphs)
    hand_over(device)  # This thread may have loaded the weights on a stream of its own.
    # Under a plan a phase has the memory to itself.
    return RequestLoop(queue, machine, device, overlapped=placement is None, threaded=threaded)


def statistics_of(loop: RequestLoop, parts: LoadedParts) -> EngineStatistics:
    """Counts at one moment."""
    queue, counters = loop.queue, loop.queue.counters
    requests = queue.requests
    return EngineStatistics(
        queued=sum(not request.begun for request in requests),
        running=sum(request.begun for request in requests),
        queued_bytes=sum(work.size_bytes for request in requests if (work := request.work) is not None),
        steps=counters.steps,
        tokens=counters.tokens,
        tokens_in_step=counters.tokens_in_step,
        requests_in_step=counters.requests_in_step,
        occupancy=counters.members / counters.steps if counters.steps else 0.0,
        batches_formed=loop.machine.batches_formed,
        lora_switches=counters.lora_switches,
        memory_retries=counters.memory_retries,
        outcomes=dict(counters.outcomes),
        caches=parts.pipeline.cache_statistics(),
        graphs=loop.machine.graph_statistics(),
    )
