"""The simulator of many replicas: what must hold in any queue, and that it tells routing rules apart."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.records import load
from benchmarks.scaling import simulate
from benchmarks.scaling.local_ray import observations
from benchmarks.scaling.plots import PLOTS, Panel, draw
from benchmarks.scaling.replica import CACHED, SimulatedReplica
from benchmarks.scaling.requests import SimulatedRequest
from benchmarks.scaling.simulation import Deployment, Rule, Simulation
from benchmarks.scaling.tables import TABLES
from benchmarks.serving.arrivals import arrivals
from uso_engine.serving.ray.demand import Demand


def request(name: str, seconds: float, at_s: float = 0.0, **encoding: float) -> SimulatedRequest:
    return SimulatedRequest(
        at_s, "small", Demand(name, 100), seconds, {key.replace("_", " "): s for key, s in encoding.items()}
    )


def test_a_gpus_time_is_shared_between_the_first_and_the_shortest() -> None:
    replica = SimulatedReplica("r", 0, 0.0)
    replica.begin(request("long", 10.0), 0.0)
    assert replica.next_end_s() == 10.0
    replica.begin(request("short", 1.0), 4.0)
    assert replica.next_end_s() == 6.0
    replica.advance(6.0)
    assert [done.demand.id for done in replica.take_done()] == ["short"]
    assert replica.next_end_s() == pytest.approx(11.0)
    replica.advance(11.0)
    assert replica.take_done() and replica.busy_s == pytest.approx(11.0)


def test_conditions_are_paid_for_once_while_they_are_cached() -> None:
    replica = SimulatedReplica("r", 0, 0.0)
    replica.begin(request("1", 1.0, style_1=0.5, prompt_1=0.25), 0.0)
    replica.begin(request("2", 1.0, style_1=0.5, prompt_2=0.25), 0.0)
    assert [job.left_s for job in replica.jobs] == [1.75, 1.25]
    for number in range(2, CACHED + 2):
        replica.begin(request(f"x{number}", 1.0, **{f"style_{number}": 0.5}), 0.0)
    replica.begin(request("3", 1.0, style_1=0.5, prompt_1=0.25), 0.0)
    assert replica.jobs[-1].left_s == 1.5
    assert (replica.hits, replica.lookups) == (2, 6 + CACHED)


def test_one_replica_with_one_request_at_a_time_takes_what_they_take() -> None:
    trace = [request(f"{n}", 2.0, at_s=10.0 * n) for n in range(20)]
    outcome = Simulation(Deployment(1), trace).run()
    assert [seconds for _, seconds, _ in outcome.ended] == pytest.approx([2.0] * 20)
    assert outcome.busy == pytest.approx(40.0 / outcome.end_s)


@pytest.mark.parametrize("rule", simulate.RULES)
def test_every_request_is_answered_and_time_is_conserved(rule: Rule) -> None:
    trace = simulate.draw(5, 600, 0.7, seed=3)
    outcome = Simulation(Deployment(5, rule=rule), trace).run()
    assert len(outcome.ended) == 600 and outcome.lost == outcome.refused == outcome.run_again == 0
    asked = sum(one.compute_s for one in trace)
    used = outcome.busy * 5 * outcome.end_s
    encoding = sum(sum(one.encoding_s.values()) for one in trace)
    assert asked < used < asked + encoding and 0 < outcome.hits < outcome.lookups


def test_routing_by_work_is_faster_than_chance() -> None:
    trace = simulate.draw(8, 1500, 0.8, seed=2)
    p95 = {rule: simulate.summary(Simulation(Deployment(8, rule=rule), trace).run())["p95_s"] for rule in simulate.RULES}
    assert p95["ours"] < p95["two choices"] < p95["random"]  # type: ignore[operator]


def test_the_same_seed_is_the_same_simulation() -> None:
    first, second = (Simulation(Deployment(4), simulate.draw(4, 200, 0.8, seed=5)).run() for _ in range(2))
    assert first == second


def test_a_lost_zone_loses_no_request() -> None:
    (below, above) = simulate.zone_loss(6, 1, lost_s=30.0, end_s=60.0)
    for case in (below, above):
        assert case["lost"] == 0 and case["run_again"] > 0  # type: ignore[operator]
        counts = [window["replicas"] for window in case["windows"]]  # type: ignore[attr-defined]
        assert counts[0] == 6 and 4 in counts


def test_a_full_deployment_refuses() -> None:
    trace = [request(f"{n}", 100.0) for n in range(10)]
    outcome = Simulation(Deployment(2, most_waiting=3), trace).run()
    assert (len(outcome.ended), outcome.refused) == (6, 4)


def test_replicas_follow_the_load() -> None:
    case = simulate.rising_load(4, 1, most=12)
    counts = [window["replicas"] for window in case["windows"]]  # type: ignore[attr-defined]
    assert counts[0] == 4 and max(counts) >= 7 and counts[-1] <= 5 and case["lost"] == 0


def test_moments_and_kinds_are_the_load_generators() -> None:
    trace = arrivals(50, 3.0, 7)
    found = simulate.ask(trace, 7)
    assert [(one.at_s, one.kind) for one in found] == [(one.at_s, one.size.name) for one in trace]
    assert [len(one.demand.pictures) for one in found] == [one.size.references for one in trace]


def test_the_script_writes_what_tables_and_plots_show(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    simulate.main(["--scenario", "load", "shares", "--replicas", "2", "--fleet", "3", "--each", "5", "--out", str(out)])
    records = load(tmp_path)
    assert [record["benchmark"] for record in records] == ["scaling_load", "scaling_shares"]
    tables = {table.marker: table.text(records) for table in TABLES}
    assert "ours: p95, s (cache hits)" in tables["scaling load"] and len(tables["scaling shares"].splitlines()) == 7
    (plot,) = (one for one in PLOTS if one.benchmarks == ("scaling_load",))
    assert not plot.is_current(tmp_path, records)
    plot.write(tmp_path, records)
    assert plot.is_current(tmp_path, records) and not plot.is_current(tmp_path, [])


def test_plots_are_svg_with_every_point_inside() -> None:
    lines = {"ours": [(0.5, 1.0), (0.9, 37.0)], "random": [(0.5, 2.0), (0.9, 110.0)]}
    root = ElementTree.fromstring(
        draw([Panel("p", lines, "load", logarithmic=True), Panel("q", lines, "load", marks={"x": 0.7})])
    )
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    found = [line.attrib["points"] for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(found) == 4
    for points in found:
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= wide and 0 <= y <= high


def test_a_failed_or_skipped_test_is_no_observation(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    case = '<testcase name="test_it_works" time="1.5">{}</testcase>'
    said = '<properties><property name="found" value="yes"/></properties>'
    report.write_text(f"<testsuites><testsuite>{case.format(said)}</testsuite></testsuites>")
    assert observations(report) == [("it works", "yes", 1.5)]
    for wrong in ("<failure/>", "<skipped/>", "<error/>"):
        report.write_text(f"<testsuites><testsuite>{case.format(said + wrong)}</testsuite></testsuites>")
        with pytest.raises(SystemExit, match="nothing is recorded"):
            observations(report)
    report.write_text("<testsuites/>")
    with pytest.raises(SystemExit, match="no test ran"):
        observations(report)
