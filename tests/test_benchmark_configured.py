"""Whole requests on the weights that a configuration names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare.configured import ConfiguredModels
from benchmarks.compare.run import Comparison, main, parser
from uso_engine.config import load_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USO_REFERENCE_DIR", raising=False)


def test_real_weights_answer_like_the_authors_way(tmp_path: Path) -> None:
    """uso-tiny's files, LoRA beside the matrices for the one and merged for the other; what cannot hold them says why."""
    out = tmp_path / "records.jsonl"
    main(["--config", "uso-tiny", "--dtype", "float32", "--rounds", "1", "--cases", "64x64-content-style", "--out", str(out)])
    records = {record["way"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert set(records) == {"ours, float32", "authors' way"}
    assert records["ours, float32"]["size"] == "uso-tiny" and records["ours, float32"]["steps"] == 28
    assert 0 < records["authors' way"]["difference"] < 1e-5
    assert records["authors' way"]["not_run"]["diffusers"] == "its MLP is 4 times as wide as the model, this one's 3 times"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": None}, "need every part of USO, it has no .*projector"),
        ({"loras": []}, "the authors' code takes one LoRA, it has 0"),
    ],
)
def test_a_configuration_that_not_all_can_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        ConfiguredModels(load_config("uso-tiny").model_copy(update=changes), CPU, torch.float32)


def test_a_configuration_that_is_not_here_is_named() -> None:
    for name in ("no-such-model", "uso-flux-dev"):
        with pytest.raises(SystemExit, match=f"--config {name}: "):
            Comparison(parser().read(["--config", name, "--device", "cpu"]), "")
