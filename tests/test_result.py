"""What results are told to do: write themselves, become a response."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uso_engine import USOEngine

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}


WRONG_CALLS: list[tuple[Callable[[Any], object], str]] = [
    (lambda r: r.save(7), "path must be a path, got int"),
    (lambda r: r.save(b"out.png"), "path must be a path, got bytes"),
    (lambda r: r.save("out.png", parameters="no"), "parameters must be True or False, got 'no'"),
    (lambda r: r.to_response("files"), "store must have a method put, as FileStore has, got 'files'"),
    (lambda r: r.to_response(sync_mode="no"), "sync_mode must be True or False, got 'no'"),
    (lambda r: r.to_response(sync_mode=True, parameters=1), "parameters must be True or False, got 1"),
]


def test_results_name_wrong_arguments(engine: USOEngine) -> None:
    result = engine.generate("a fish", seed=1, **SMALL)
    for call, says in WRONG_CALLS:
        with pytest.raises(ValueError, match=re.escape(says)):
            call(result)


def test_a_home_is_meant_where_results_are_written(engine: USOEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = engine.generate("a fish", seed=1, **SMALL)
    with engine.trace("~/trace.json"):
        assert result.save("~/out.png") == [tmp_path / "home" / "out.png"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["out.png", "trace.json"]
    assert not (tmp_path / "~").exists()


def test_a_traces_path_is_looked_at_before_the_work(engine: USOEngine) -> None:
    with pytest.raises(ValueError, match="path must be a path, got int"), engine.trace(3):  # type: ignore[arg-type]
        raise AssertionError("the work has begun")
