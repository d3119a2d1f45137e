"""Which replica a request goes to: by load, then by what is cached; who is refused, and who rests."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uso_engine.serving.ray.demand import Demand
from uso_engine.serving.ray.policy import RoutingSettings, RoutingTable, refused_of
from uso_engine.serving.ray.report import Identity, Report

SAME = Identity("configuration", "1", "aaaa")
OTHER = Identity("configuration", "1", "bbbb")
WORK = 1000


def demand(name: str, work: int = WORK, **fields: object) -> Demand:
    return Demand(name, work, **fields)  # type: ignore[arg-type]


def table(*replicas: str, ingress: str = "me", **chosen: float) -> RoutingTable:
    made = RoutingTable(ingress, RoutingSettings(**chosen))  # type: ignore[arg-type]
    made.set_replicas(replicas)
    for replica in replicas:
        made.report(replica, Report(SAME, 1.0), 0.0)
    return made


def test_the_fewest_tokens_in_flight_win() -> None:
    routing = table("a", "b", "c")
    for name, replica in (("1", "a"), ("2", "a"), ("3", "b")):
        routing.sent(demand(name), replica)
    assert routing.choose(demand("4"), 0.0) == ["c", "b", "a"]
    routing.sent(demand("4"), "c")
    routing.ended("1")
    routing.ended("2")
    assert routing.choose(demand("5"), 0.0)[0] == "a"


def test_work_counts_and_not_requests() -> None:
    routing = table("a", "b")
    routing.sent(demand("large", 9000), "a")
    for name in ("1", "2", "3"):
        routing.sent(demand(name), "b")
    assert routing.choose(demand("4"), 0.0)[0] == "b"


@pytest.mark.parametrize("kind", ["prompts", "pictures"])
def test_among_equals_the_one_that_has_it(kind: str) -> None:
    routing = table("a", "b", "c", "d")
    key = frozenset({"key"})
    chosen = {}
    for holder in "abcd":
        routing = table("a", "b", "c", "d")
        routing.report(holder, Report(SAME, 1.0, keys=key), 1.0)
        chosen[holder] = routing.choose(Demand("1", WORK, **{kind: key}), 1.0)[0]  # type: ignore[arg-type]
    assert chosen == {holder: holder for holder in "abcd"}


def test_loras_before_pictures_before_prompts() -> None:
    routing = table("lora", "picture", "prompt")
    routing.report("lora", Report(SAME, 1.0, loras="l"), 1.0)
    routing.report("picture", Report(SAME, 1.0, keys=frozenset({"style"})), 1.0)
    routing.report("prompt", Report(SAME, 1.0, keys=frozenset({"text"})), 1.0)
    wanted = demand("1", prompts=frozenset({"text"}), pictures=frozenset({"style"}), loras="l")
    assert routing.choose(wanted, 1.0)[0] == "lora"
    unmerged = demand("2", prompts=frozenset({"text"}), pictures=frozenset({"style"}))
    assert routing.choose(unmerged, 1.0)[0] == "picture"
    assert routing.choose(demand("3", prompts=frozenset({"text"})), 1.0)[0] == "prompt"


def test_a_cached_picture_is_worth_a_share_of_the_work_and_no_more() -> None:
    routing = table("holder", "idle", equal_share=0.25)
    routing.report("holder", Report(SAME, 1.0, keys=frozenset({"style"})), 1.0)
    wanted = demand("1", pictures=frozenset({"style"}))
    routing.sent(demand("before", WORK // 4), "holder")
    assert routing.choose(wanted, 1.0)[0] == "holder"
    routing.sent(demand("more", 1), "holder")
    assert routing.choose(wanted, 1.0)[0] == "idle"


def test_what_was_sent_is_taken_for_cached_until_the_replica_says_otherwise() -> None:
    routing = table("a", "b", "c", "d")
    wanted = demand("1", pictures=frozenset({"style"}))
    first = routing.choose(wanted, 0.0)[0]
    another = next(replica for replica in "abcd" if replica != first)
    routing.sent(wanted, another)
    routing.ended("1")
    assert routing.choose(demand("2", pictures=frozenset({"style"})), 0.0)[0] == another
    routing.report(another, Report(SAME, 1.0, busy=0.5), 1.0)
    assert routing.choose(demand("3", pictures=frozenset({"style"})), 1.0)[0] == first


def test_several_ingresses_send_the_same_pictures_the_same_way_and_spread_others() -> None:
    names = [f"replica-{number}" for number in range(8)]
    one, two = table(*names, ingress="one"), table(*reversed(names), ingress="two")
    styles = [frozenset({f"style {number}"}) for number in range(64)]
    first = [one.choose(demand("x", pictures=style), 0.0)[0] for style in styles]
    assert first == [two.choose(demand("y", pictures=style), 0.0)[0] for style in styles]
    assert len(set(first)) == len(names)


def test_the_work_of_other_ingresses_counts_once() -> None:
    routing = table("a", "b", ingress="me")
    routing.sent(demand("1", 500), "a")
    routing.report("a", Report(SAME, 1.0, work={"me": 9999, "other": 700}), 1.0)
    assert routing.load("a") == 1200
    routing.ended("1")
    assert routing.load("a") == 700


def test_the_minority_of_a_configuration_is_refused_and_asked_again_when_it_agrees() -> None:
    routing = table("a", "b", "c")
    routing.report("c", Report(OTHER, 1.0), 1.0)
    assert routing.refused == {"c"}
    routing.sent(demand("1", 10**9), "a")
    routing.sent(demand("2", 10**9), "b")
    assert "c" not in routing.choose(demand("3"), 1.0)
    routing.report("c", Report(SAME, 2.0), 2.0)
    assert routing.refused == frozenset() and routing.choose(demand("3"), 2.0)[0] == "c"


def test_of_two_that_differ_the_older_one_is_right_and_the_other_takes_over_when_it_is_gone() -> None:
    routing = RoutingTable("me")
    routing.set_replicas(["old", "new"])
    routing.report("old", Report(OTHER, 1.0), 0.0)
    routing.report("new", Report(SAME, 2.0), 0.0)
    assert routing.refused == {"new"}
    routing.set_replicas(["new"])
    assert routing.refused == frozenset() and routing.choose(demand("1"), 0.0) == ["new"]


def test_a_new_configuration_that_is_rolled_out_is_no_fault() -> None:
    reports = {"a": Report(SAME, 1.0), "b": Report(SAME, 1.0), "c": Report(Identity("next", "2", "cccc"), 3.0)}
    assert refused_of(reports) == frozenset()


def test_another_run_goes_elsewhere_and_to_the_same_weights() -> None:
    routing = RoutingTable("me")
    routing.set_replicas(["dead", "same", "next"])
    for name, identity in (("dead", SAME), ("same", SAME), ("next", Identity("next", "2", "cccc"))):
        routing.report(name, Report(identity, 1.0), 0.0)
    routing.sent(demand("busy", 10**9), "same")
    again = demand("1", identity=SAME.digest, avoid=frozenset({"dead"}))
    assert routing.choose(again, 0.0) == ["same"]
    # With none of them left, the replica itself refuses; the request must not wait without end.
    routing.set_replicas(["next"])
    assert routing.choose(again, 0.0) == ["next"]


def test_a_slow_replica_rests_and_is_tried_again() -> None:
    routing = table("a", "b", "slow", slow_ratio=0.33, rest_s=60.0)
    for name, rate in (("a", 1000.0), ("b", 1100.0), ("slow", 200.0)):
        routing.report(name, Report(SAME, 1.0, tokens_per_s=rate), 10.0)
    for name in ("a", "b"):
        routing.sent(demand(f"on {name}", 10**9), name)
    assert "slow" not in routing.choose(demand("1"), 69.0)
    assert routing.choose(demand("1"), 70.0)[0] == "slow"


def test_resting_replicas_are_better_than_none() -> None:
    routing = table("a", "slow", slow_ratio=0.5)
    routing.report("a", Report(SAME, 1.0, tokens_per_s=1000.0), 0.0)
    routing.report("slow", Report(SAME, 1.0, tokens_per_s=10.0), 0.0)
    routing.set_replicas(["slow"])
    assert routing.choose(demand("1"), 1.0) == ["slow"]


def test_without_replicas_there_is_no_choice() -> None:
    assert RoutingTable("me").choose(demand("1"), 0.0) == []


@pytest.mark.parametrize("fields", [{"equal_share": 1.0}, {"slow_ratio": -0.1}, {"rest_s": 0.0}, {"alternatives": -1}])
def test_settings_that_make_no_sense(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"equal_share|slow_ratio|rest_s"):
        RoutingSettings(**fields)  # type: ignore[arg-type]


def test_a_demand_has_work() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        demand("1", 0)


names = st.sampled_from("abcdef")
operation = st.one_of(
    st.tuples(st.just("request"), st.integers(0, 20), st.integers(1, 5000), st.sets(st.sampled_from("xyz"))),
    st.tuples(st.just("end"), st.integers(0, 20)),
    st.tuples(st.just("replicas"), st.sets(names)),
    st.tuples(st.just("report"), names, st.integers(0, 5000), st.sampled_from([SAME, OTHER]), st.floats(1, 1e4)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(operation, max_size=60))
def test_whatever_happens_the_choice_is_by_load_and_work_adds_up(operations: list[tuple[Any, ...]]) -> None:
    routing, in_flight, present, now_s = RoutingTable("me"), dict[str, tuple[str, int]](), set[str](), 0.0
    elsewhere: dict[str, int] = {}
    for step in operations:
        now_s += 1.0
        if step[0] == "request":
            wanted = demand(f"r{step[1]}", step[2], pictures=frozenset(step[3]))
            found = routing.choose(wanted, now_s)
            assert bool(found) == bool(present) and set(found) <= present and len(found) == len(set(found))
            if not found:
                continue
            usable = set(routing._usable(wanted, now_s))
            least = min(routing.load(replica) for replica in usable)
            assert found[0] in usable and routing.load(found[0]) <= least + wanted.work * RoutingSettings().equal_share
            assert not usable & routing.refused or usable <= routing.refused
            routing.sent(wanted, found[0])
            in_flight[wanted.id] = found[0], wanted.work
        elif step[0] == "end":
            routing.ended(f"r{step[1]}")
            in_flight.pop(f"r{step[1]}", None)
        elif step[0] == "replicas":
            present = set(step[1])
            routing.set_replicas(present)
            elsewhere = {name: work for name, work in elsewhere.items() if name in present}
        else:
            _, name, work, identity, rate = step
            routing.report(name, Report(identity, 1.0, work={"other": work}, tokens_per_s=rate), now_s)
            if name in present:
                elsewhere[name] = work
        for replica in present:
            mine = sum(work for where, work in in_flight.values() if where == replica)
            assert routing.load(replica) == mine + elsewhere.get(replica, 0)
