"""The table ``[queue]`` of a configuration."""

from __future__ import annotations

from pydantic import Field

from .section import Section

LARGEST_MIB = 1_048_576
LONGEST_S = 31_536_000


class QueueLimits(Section):
    """How much waits and how long, when requests come faster than they are done; beyond it a request is refused at once.

    `max_requests` and `max_mib` (of opened pictures and given tensors) bound what is accepted and not yet done, `max_queue_s`
    the time until a request's first step, `max_request_s` the time until it is done. Requests share a denoising step up to
    `max_step_tokens` transformer tokens; a larger one has a step to itself. Requests with other LoRAs than those in the weights
    are waited for at most `lora_patience_s` before the weights change for them.
    """

    max_requests: int = Field(64, ge=1, le=1_000_000)
    max_mib: float = Field(2048, gt=0, le=LARGEST_MIB)
    max_queue_s: float = Field(3_600, gt=0, le=LONGEST_S)
    max_request_s: float = Field(86_400, gt=0, le=LONGEST_S)
    max_step_tokens: int = Field(4_608, ge=1, le=100_000_000)
    lora_patience_s: float = Field(10, ge=0, le=LONGEST_S)
