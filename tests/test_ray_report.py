"""What a replica's report may hold: it comes from another process, which may be of another version. Needs no Ray."""

import re

import pytest

from uso_engine.serving.ray.remote_engine import summed
from uso_engine.serving.ray.report import Identity, Report, read_report

REPORT = Report(Identity("c", "v", "w"), 1.0, work={"ingress": 3}, keys=frozenset({"b", "a"}), engine={"steps": 2})


def test_a_report_comes_through_plain_json() -> None:
    assert read_report(REPORT.plain()) == REPORT


@pytest.mark.parametrize(
    "changes", [{"identity": "x"}, {"keys": "abc"}, {"engine": [1]}, {"identity": {"version": "0"}}, {"speed": 1}], ids=str
)
def test_a_report_of_another_kind_is_refused(changes: dict[str, object]) -> None:
    """Letters of a text would be keys, and what is no table would end the metrics."""
    with pytest.raises(ValueError, match="expected a replica's report"):
        read_report({**REPORT.plain(), **changes})


@pytest.mark.parametrize("missing", ["identity", "keys"])
def test_a_report_without_what_decides_is_refused(missing: str) -> None:
    plain = REPORT.plain()
    del plain[missing]
    with pytest.raises(ValueError, match="expected a replica's report"):
        read_report(plain)


@pytest.mark.parametrize(
    ("counters", "says"),
    [
        ({"steps": "3"}, "a replica's 'steps' must be a number, got 3"),
        ({"outcomes": [1]}, "a replica's 'outcomes' must be an object, got [1]"),
        ({"graphs": {"failures": "none"}}, "a replica's 'failures' must be a list, got none"),
    ],
)
def test_counters_of_another_kind_are_refused(counters: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        summed([counters])
