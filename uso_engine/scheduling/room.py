"""Whether a request may begin beside those that have, as the memory plan counts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from uso_engine.generation import Generation
from uso_engine.offload.placement import Placement

from .active import ActiveRequest
from .scheduler import Ticket


def room_of(
    placement: Placement | None, max_step_tokens: int, ending: Callable[[], Sequence[ActiveRequest]]
) -> Callable[[Ticket, Sequence[Ticket]], bool]:
    """What is asked before a request is encoded or begins: by itself it always may, `Generation.open` has checked that.

    Args:
        placement: with the plan; None where nothing bounds memory.
        max_step_tokens: what a step holds.
        ending: requests that take no more steps and hold their latents still.
    """
    if placement is None:
        return lambda ticket, begun: True

    def fits(ticket: Ticket, begun: Sequence[Ticket]) -> bool:
        holding = dict.fromkeys((*begun, *ending()))
        holding.pop(ticket, None)
        sizes = [
            request.work.size()
            for request in (*holding, ticket)
            if isinstance(request, ActiveRequest) and isinstance(request.work, Generation)
        ]
        return not holding or placement.has_room(sizes, max_step_tokens)

    return fits
