"""Whole requests on the weights that a configuration names."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare.configured import ConfiguredModels
from benchmarks.compare.run import Comparison, done_cases, main, parser
from benchmarks.measure import tree_hash
from uso_engine.config import load_config
from uso_engine.embedded.build import FOLDER

CPU = torch.device("cpu")
Edit = Callable[..., Path]


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
        ({"name": "small"}, "--config small: records call a size of random models so"),
        (
            {"transformer": load_config("uso-tiny").transformer.model_copy(update={"family": "uno"})},
            "expected a model of the family uso, got uno",
        ),
    ],
)
def test_a_configuration_that_not_all_can_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        ConfiguredModels(load_config("uso-tiny").model_copy(update=changes), CPU, torch.float32)


def test_a_configuration_that_is_not_here_is_named() -> None:
    for name in ("no-such-model", "uso-flux-dev"):
        with pytest.raises(SystemExit, match=f"--config {name}: "):
            Comparison(parser().read(["--config", name, "--device", "cpu"]), "")


@pytest.fixture
def edited(tmp_path: Path, repository: Path) -> Edit:
    """Writes uso-tiny's configuration with a LoRA of its own and other words; the file and the name stay the same."""
    shutil.copy(FOLDER / "dit_lora.safetensors", tmp_path / "lora.safetensors")

    def write(*changes: tuple[str, str]) -> Path:
        text = (repository / "configs" / "uso-tiny.toml").read_text()
        for old, new in (("embedded:uso-tiny/dit_lora.safetensors", "lora.safetensors"), *changes):
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = tmp_path / "uso-tiny.toml"
        path.write_text(text)
        return path

    return write


def test_size_steps_and_guidance_are_the_configurations(edited: Edit, tmp_path: Path) -> None:
    """A size below the limits of what it lets others ask for, too: half of its own is always compared."""
    out = tmp_path / "records.jsonl"
    arguments = ["--dtype", "float32", "--rounds", "1", "--cases", "64x48-content-style", "--out", str(out)]
    for guidance in (2.5, 4.0):
        defaults = f"width = 150\nheight = 96\nsteps = 2\nguidance = {guidance}"
        path = edited(("width = 128\nheight = 128", defaults), ("min_side = 64", "min_side = 80"), ("side = 128", "side = 64"))
        main(["--config", str(path), *arguments])
    size = ConfiguredModels(load_config(path), CPU, torch.float32).size
    assert [case.name for case in size.core()[::3]] == ["64x48-content", "144x96-content"]
    assert [case.name for case in size.rest()] == [
        "96x96-content-style",
        "64x48-content-style-2-images",
        "64x48-content-style-4-images",
        "144x96-content-style-2-steps",
        "144x96-content-style-style",
    ]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(record["difference"] < 1e-5 for record in records)  # Each of one guidance in both ways.
    assert {(record["steps"], record["tokens"]) for record in records} == {(2, 20 + 12 + 4 * 3 + 4 * 4)}
    assert len({(record["way"], record["sha256"]) for record in records}) == 4


def test_a_size_of_a_token_is_compared_once(edited: Edit) -> None:
    path = edited(("width = 128\nheight = 128", "width = 17\nheight = 30"))
    options = parser().read(["--config", str(path), "--rest", "--again"])
    names = [case.name for case in Comparison(options, "").cases]
    assert len(names) == len(set(names)) and {name.partition("-")[0] for name in names} == {"16x16"}


def test_records_of_other_settings_or_files_by_that_name_are_not_taken(edited: Edit, tmp_path: Path) -> None:
    def key(*changes: tuple[str, str]) -> dict[str, object]:
        return Comparison(parser().read(["--config", str(edited(*changes)), "--device", "cpu"]), "").key

    before = key()
    out = tmp_path / "records.jsonl"
    found = [
        {"benchmark": "compare", "case": "a case", "way": way, "tree": tree_hash(), **before} for way in ("ours", "theirs")
    ]
    out.write_text("\n".join(json.dumps(record) for record in found) + "\n")
    shared = {"ways": ["ours", "authors' way"]}
    assert done_cases(out, key() | shared) == {"a case"}
    assert done_cases(out, key(("Small demonstration", "A small demonstration")) | shared) == {"a case"}
    assert done_cases(out, key(("width = 128", "width = 128\nguidance = 3.0")) | shared) == set()
    assert done_cases(out, key(('lora.safetensors"', 'lora.safetensors"\nweight = 0.5')) | shared) == set()
    assert done_cases(out, key(("max_length = 20", "max_length = 24")) | shared) == set()
    assert done_cases(out, key() | shared) == {"a case"}
    # The same words, and another file.
    status = (tmp_path / "lora.safetensors").stat()
    os.utime(tmp_path / "lora.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert done_cases(out, key() | shared) == set()
