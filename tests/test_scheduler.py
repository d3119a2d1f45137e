"""The policy by itself: who takes part in a step, told the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uso_engine.scheduling.scheduler import HEAD_START_S, Scheduler, Ticket


def ticket(tokens: int, steps: int = 10, arrival_s: float = 0.0, **more: object) -> Ticket:
    return Ticket(tokens, steps, arrival_s, **{"ready": True, **more})  # type: ignore[arg-type]


def scheduler(*tickets: Ticket, step_tokens: int = 100, patience_s: float = 10) -> Scheduler:
    made = Scheduler(step_tokens, patience_s)
    for entry in tickets:
        made.add(entry)
    return made


def take(made: Scheduler, now_s: float = 0.0) -> list[Ticket]:
    chosen = made.choose(now_s)
    made.step_taken(chosen)
    for entry in chosen:
        if not entry.steps_left:
            made.remove(entry)
    return chosen


def order(made: Scheduler) -> list[Ticket]:
    """Everyone in the order of their ends."""
    everyone, ended = made.tickets, list[Ticket]()
    while made.tickets:
        assert take(made)
        ended += [entry for entry in everyone if not entry.steps_left and entry not in ended]
    return ended


def test_equals_go_in_the_order_in_which_they_came() -> None:
    tickets = [ticket(100, arrival_s=s) for s in range(4)]
    assert order(scheduler(*tickets)) == tickets


def test_small_ones_share_a_step_up_to_its_tokens() -> None:
    tickets = [ticket(40, arrival_s=s) for s in range(4)]
    made = scheduler(*tickets)
    assert take(made) == tickets[:2]
    assert len(take(scheduler(*(ticket(10) for _ in range(15))))) == 10
    assert take(scheduler(huge := ticket(1000))) == [huge]


def test_a_small_one_passes_a_large_one_that_keeps_two_thirds() -> None:
    large, small = ticket(100, 50), ticket(60, 10, arrival_s=1)
    made = scheduler(large)
    take(made)
    made.add(small)
    taken = [take(made)[0] for _ in range(20)]
    # The large one gets a step as soon as it is owed one: at most every third token goes elsewhere.
    assert [entry is large for entry in taken[:6]] == [False, True, False, True, False, True]
    assert [(taken.count(entry), entry.steps_left) for entry in (small, large)] == [(10, 0), (10, 39)]


@dataclass
class Arrival:
    """A request that comes at a moment of the device's time, counted in tokens."""

    tokens: int
    steps: int
    at: int


ARRIVALS = st.lists(st.builds(Arrival, st.integers(1, 300), st.integers(1, 12), st.integers(0, 4_000)), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(ARRIVALS, st.integers(1, 400))
def test_nobody_takes_more_than_half_as_long_again_as_one_after_another(arrivals: Sequence[Arrival], step_tokens: int) -> None:
    """With v tokens of earlier requests before it and w of its own, in full steps: 1.5 (v + w), and one step that has begun."""
    made = scheduler(step_tokens=step_tokens)
    waiting = sorted(arrivals, key=lambda arrival: arrival.at)
    tickets = [(ticket(entry.tokens, entry.steps, entry.at), entry) for entry in waiting]
    longest = max(step_tokens, *(entry.tokens for entry in arrivals))
    spent, bounds, coming = 0, dict[int, float](), list(tickets)
    while coming or made.tickets:
        if not made.tickets:
            spent = max(spent, coming[0][1].at)
        while coming and coming[0][1].at <= spent:
            entry, _ = coming.pop(0)
            made.add(entry)
            work = sum(max(step_tokens, other.tokens) * other.steps_left for other in made.tickets)
            bounds[id(entry)] = spent + 1.5 * work + longest
        chosen = take(made)
        spent += sum(entry.tokens for entry in chosen)
        for entry in chosen:
            if not entry.steps_left:
                assert spent <= bounds[id(entry)]


def test_priority_is_a_head_start_and_not_a_right() -> None:
    first, urgent = ticket(100, 5), ticket(100, 5, arrival_s=HEAD_START_S / 2, priority=1)
    assert order(scheduler(first, urgent)) == [urgent, first]
    late = ticket(100, 5, arrival_s=2 * HEAD_START_S, priority=1)
    made = scheduler(first := ticket(100, 5), late)
    taken = [take(made)[0] for _ in range(6)]
    assert taken.count(first) >= 4  # It is first in the order of arrival, so two of three steps are its own.


def test_only_those_who_agree_share_a_step() -> None:
    tickets = [ticket(10, company=name) for name in ("a", "b", "a")]
    made = scheduler(*tickets)
    assert take(made) == [tickets[0], tickets[2]]


def test_those_who_are_not_ready_are_passed_over() -> None:
    waiting, ready = ticket(10, ready=False), ticket(10, arrival_s=1)
    made = scheduler(waiting, ready)
    assert take(made) == [ready]
    waiting.ready = True
    assert set(take(made)) == {waiting, ready}
    assert Scheduler(10, 1).choose(0) == []


def test_memory_decides_who_begins_and_nobody_passes_the_first_without_room() -> None:
    tickets = [ticket(30, 3, arrival_s=s) for s in range(4)]
    made = Scheduler(100, 10, fits=lambda entry, begun: len(begun) < 2)
    for entry in tickets:
        made.add(entry)
    assert take(made) == tickets[:2]
    assert take(made) == tickets[:2]
    take(made)
    assert take(made) == tickets[2:]


def test_a_step_that_was_too_large_is_not_tried_again() -> None:
    tickets = [ticket(30) for _ in range(3)]
    made = scheduler(*tickets)
    made.shrink(90)
    assert len(made.choose(0)) == 2
    for entry in tickets:
        made.remove(entry)
    made.add(ticket(30))
    made.add(ticket(30))
    made.add(ticket(30))
    assert len(made.choose(0)) == 3


def test_other_loras_wait_for_those_that_run_and_at_most_their_patience() -> None:
    present, more, other = ticket(100, 3), ticket(100, 9, arrival_s=1), ticket(10, 2, arrival_s=2, loras="x")
    made = scheduler(present, more, other, patience_s=10)
    assert made.loras_due(2) is None
    assert take(made, 3) == [present]  # The other one is smaller, but needs other weights.
    assert made.wakes_s(3) == 12
    # From now on nobody with the present weights begins; who has begun goes on.
    assert take(made, 12) == [present]
    assert made.loras_due(12) is None
    assert take(made, 13) == [present]
    assert made.loras_due(14) is other
    made.loras_changed("x", 14)
    assert take(made, 15) == [other]
    # The new weights stay for their patience, too, and go at once when nobody wants them any more.
    assert take(made, 16) == [other]
    assert made.loras_due(16) is more


@pytest.mark.parametrize("rounds", [400])
def test_sets_of_loras_take_turns(rounds: int) -> None:
    """However many come for one set, the others are not starved."""
    made, done = Scheduler(100, 10, loras="a"), {"a": 0, "b": 0, "c": 0}
    for now_s in range(rounds):
        for name in done:
            made.add(ticket(100, 2, arrival_s=now_s, loras=name))
        due = made.loras_due(now_s)
        if due is not None:
            made.loras_changed(due.loras, now_s)
        for entry in take(made, now_s):
            done[str(entry.loras)] += not entry.steps_left
    assert min(done.values()) > rounds / 2 / 3 / 2


def test_a_change_by_itself_waits_for_nobody_who_has_not_begun() -> None:
    running, later = ticket(100, 2), ticket(100, 2, arrival_s=1)
    made = scheduler(running, later)
    take(made)
    change = Ticket(0, 0, 2.0, loras="x", ready=True)
    made.add(change)
    assert take(made, 2) == [running]
    assert made.loras_due(2) is change
