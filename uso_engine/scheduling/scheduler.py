"""Who takes part in the next denoising step: a pure policy that is told the time.

At these lengths one image fills the machine, so requests together are done no sooner than one after another; what a policy can
give is a fair order. Steps are shared between two lines of the same requests:

    in order of arrival       two thirds of the tokens, at least: nobody waits for ever
    in order of work left     the rest: a small request passes large ones

A deficit keeps the shares: what a step without the first in line takes is owed to it, and paid as soon as it is worth a step.
So the first in line has two of three tokens or more, whatever arrives, and the worst case is one and a half times that of one
after another: a request with w tokens of work behind v tokens of earlier requests is done after 1.5 (v + w) tokens of steps,
and one step, where each of their steps counts as a full one, since others may share it. A request counts as having arrived
`HEAD_START_S` earlier for each level of its priority, and as having a quarter of its work.

A step has room for `max_step_tokens`, about what it takes to keep the device busy; up to there company costs little. It is
filled in order of work left.

Requests with other LoRAs than those in the weights wait until no request of the present ones is left, or for `lora_patience_s`;
then no request of the present ones is begun any more, and the weights change when the last one has ended.

Source: deficit round robin (Shreedhar and Varghese 1995) for the shares; shortest remaining processing time (Schrage 1968) for
the second line.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

OWED_PER_TOKEN = 2
"""Tokens that the first in order of arrival is owed for each that goes elsewhere; so its share is two thirds. With half, large
requests often take more than 1.3 times as long as one after another: `python -m benchmarks.serving.shares`."""
HEAD_START_S = 60.0
PRIORITY_FACTOR = 4.0


@dataclass(eq=False)
class Ticket:
    """What a scheduler knows of a request.

    Args:
        tokens: of one of its steps.
        steps_left: denoising steps that it has still to take.
        arrival_s: when it was accepted.
        priority: higher goes first; 0 is usual.
        company: only requests that agree in this share a step.
        loras: what has to be in the weights.
        ready: its conditions are there, and nobody looks at its last step; it may take the next one.
        begun: it has taken a step, or holds memory to take one.
    """

    tokens: int
    steps_left: int
    arrival_s: float
    priority: int = 0
    company: Hashable = None
    loras: Hashable = None
    ready: bool = False
    begun: bool = False

    @property
    def place(self) -> float:
        """Its place in the order of arrival; the lowest is first."""
        return self.arrival_s - HEAD_START_S * self.priority

    @property
    def remaining(self) -> float:
        """Tokens of work left, as priorities count them; the lowest is first."""
        return self.tokens * self.steps_left * PRIORITY_FACTOR**-self.priority


class Scheduler:
    """Chooses who takes part in the next step.

    Args:
        max_step_tokens: what a step holds; a larger request has one to itself.
        lora_patience_s: how long requests with the LoRAs in the weights may keep others waiting.
        loras: what is in the weights.
        fits: whether a request may begin beside those that have, as memory goes.
    """

    def __init__(
        self,
        max_step_tokens: int,
        lora_patience_s: float,
        *,
        loras: Hashable = None,
        fits: Callable[[Ticket, Sequence[Ticket]], bool] = lambda ticket, begun: True,
    ) -> None:
        self.max_step_tokens = self._step_tokens = max_step_tokens
        self.lora_patience_s = lora_patience_s
        self.loras = loras
        self._fits = fits
        self._tickets: list[Ticket] = []
        self._owed = 0
        self._loras_since_s = float("-inf")

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Everyone who was added and not removed, in the order in which they came."""
        return tuple(self._tickets)

    def add(self, ticket: Ticket) -> None:
        """Take a request in."""
        self._tickets.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Let a request go; its place is free at once."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        if not self._tickets:
            self._owed, self._step_tokens = 0, self.max_step_tokens

    def choose(self, now_s: float) -> list[Ticket]:
        """The requests of the next step; none where nobody may take one.

        Those who have not begun are marked as begun.
        """
        candidates = self._candidates(now_s)
        if not candidates:
            return []
        by_arrival, by_work = sorted(candidates, key=_place), sorted(candidates, key=_work)
        first = by_arrival[0]
        leader = first if self._owed >= min(first.tokens, self._step_tokens) else by_work[0]
        chosen, taken = [leader], leader.tokens
        for ticket in by_work:
            if ticket is leader or ticket.company != leader.company or taken + ticket.tokens > self._step_tokens:
                continue
            if ticket.begun or self._fits(ticket, self._begun(chosen)):
                chosen.append(ticket)
                taken += ticket.tokens
        self._count(first, chosen, taken)
        for ticket in chosen:
            ticket.begun = True
        return chosen

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a request fits beside those that have begun, as memory goes."""
        return self._fits(ticket, self._begun())

    def step_taken(self, tickets: Iterable[Ticket]) -> None:
        """Count a step of these requests."""
        for ticket in tickets:
            ticket.steps_left -= 1

    def shrink(self, tokens: int) -> None:
        """Memory did not do for a step of so many tokens: keep below until nobody is left."""
        self._step_tokens = max(1, min(self._step_tokens, tokens - 1))

    def loras_due(self, now_s: float) -> Ticket | None:
        """The request for which the weights have to change now; None while they may stay or are in use."""
        present = [ticket for ticket in self._tickets if ticket.loras == self.loras]
        if any(ticket.begun for ticket in present) or not self._must_change(now_s):
            return None
        return min((ticket for ticket in self._tickets if ticket.ready and ticket.loras != self.loras), key=_place)

    def loras_changed(self, loras: Hashable, now_s: float) -> None:
        """The weights have other LoRAs now."""
        self.loras, self._loras_since_s = loras, now_s

    def wakes_s(self, now_s: float) -> float:
        """When to look again although nothing has happened."""
        others = [ticket for ticket in self._tickets if ticket.ready and ticket.loras != self.loras]
        ends_s = self._patience_ends_s(others) if others else float("inf")
        return ends_s if ends_s > now_s else float("inf")

    def _must_change(self, now_s: float) -> bool:
        """Whether those with other LoRAs have waited long enough, or nobody is in their way."""
        others = [ticket for ticket in self._tickets if ticket.ready and ticket.loras != self.loras]
        if not others:
            return False
        in_the_way = any(ticket.loras == self.loras for ticket in self._tickets)
        # A change without steps is not for those who come before it to put off.
        return not in_the_way or any(ticket.tokens == 0 for ticket in others) or now_s >= self._patience_ends_s(others)

    def _patience_ends_s(self, others: Sequence[Ticket]) -> float:
        return max(min(ticket.arrival_s for ticket in others), self._loras_since_s) + self.lora_patience_s

    def _candidates(self, now_s: float) -> list[Ticket]:
        begun = self._begun()
        ready = [ticket for ticket in self._tickets if ticket.ready and ticket.steps_left > 0 and ticket.loras == self.loras]
        waiting = sorted((ticket for ticket in ready if not ticket.begun), key=_place)
        # Where the first has no room yet, nobody who came later may take what becomes free.
        if self._must_change(now_s) or (waiting and not self._fits(waiting[0], begun)):
            return [ticket for ticket in ready if ticket.begun]
        return [ticket for ticket in ready if ticket.begun or self._fits(ticket, begun)]

    def _begun(self, chosen: Sequence[Ticket] = ()) -> list[Ticket]:
        return [ticket for ticket in self._tickets if ticket.begun or ticket in chosen]

    def _count(self, first: Ticket, chosen: Sequence[Ticket], tokens: int) -> None:
        """What the first in order of arrival is owed after this step."""
        if first in chosen:
            self._owed = max(0, self._owed - first.tokens)
        else:
            self._owed += OWED_PER_TOKEN * tokens


def _place(ticket: Ticket) -> float:
    return ticket.place


def _work(ticket: Ticket) -> tuple[float, float]:
    return ticket.remaining, ticket.place
