"""Whole requests by every way at tiny size: the same velocities, counted and recorded; resumed where a run was cut off."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import first_request
from benchmarks.compare.authors import RenderedAuthors
from benchmarks.compare.cases import SIZES, pictures
from benchmarks.compare.evaluations import Evaluations
from benchmarks.compare.memory import peak_rise
from benchmarks.compare.models import Models, encode
from benchmarks.compare.peers import missing_fp8, missing_reference
from benchmarks.compare.run import Comparison, done_cases, main, parser
from uso_engine.profiling.roofline import step_flops

TINY = SIZES["tiny"]
CASE = "64x64-content-style"
CPU = torch.device("cpu")
ARGUMENTS = ["--size", "tiny", "--device", "cpu", "--dtype", "float32", "--tiers", "int8"]


@pytest.fixture(autouse=True, scope="module")
def without_reference() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("USO_REFERENCE_DIR", raising=False)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "records.jsonl"
    main([*ARGUMENTS, "--cases", CASE, "64x64-content-style-2-images", "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def records(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return {(record["case"], record["way"]): record for record in found}


def test_every_way_computes_the_engines_velocity(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    differences = {way: record["difference"] for (case, way), record in records.items() if case == CASE}
    assert set(differences) == {"ours, float32", "ours, int8", "authors' way", "diffusers"}
    assert differences["ours, float32"] == 0
    assert 0 < differences["authors' way"] < 1e-5
    assert 0 < differences["diffusers"] < 1e-5
    assert 1e-4 < differences["ours, int8"] < 0.1


def test_a_record_says_what_was_measured_and_how(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    ours, theirs = records[CASE, "ours, float32"], records[CASE, "authors' way"]
    needed = step_flops(TINY.params, TINY.tokens(TINY.core()[2]))
    assert ours["needed_flops"] == theirs["needed_flops"] == needed
    assert needed == ours["flops"]
    assert theirs["flops"] > 1.2 * ours["flops"]
    assert ours["allocations"] > 0 and theirs["allocations"] > ours["allocations"]
    assert ours["of_floor"] == pytest.approx(ours["floor_ms"] / ours["step_ms"]["median_ms"])
    assert ours["command"].startswith("python -m benchmarks.compare --size tiny")
    assert ours["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"authors' code", "diffusers, compiled", "diffusers, torchao fp8, compiled", "sglang"} <= set(ours["not_run"])
    assert len(ours["sha256"]) == 64 and ours["sha256"] != theirs["sha256"]


def test_several_pictures_of_a_peer_are_one_evaluation(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    case = "64x64-content-style-2-images"
    both, one = records[case, "diffusers"], records[CASE, "diffusers"]
    assert both["needed_flops"] == 2 * one["needed_flops"]
    assert records[case, "authors' way"]["needed_flops"] == one["needed_flops"]
    assert both["difference"] < 1e-5


def test_a_run_goes_on_where_it_was_cut_off(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, "--cases", CASE, "--out", str(out)])
    assert "every case has its records" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    cut = tmp_path / "records.jsonl"
    # The second case had begun: one of its ways is missing.
    cut.write_text("\n".join(lines[:-1]) + "\n")
    options = parser().read([*ARGUMENTS, "--out", str(cut), "--cases", CASE, "64x64-content-style-2-images"])
    assert [case.name for case in Comparison(options, "").cases] == ["64x64-content-style-2-images"]
    other_sources = [json.dumps({**json.loads(line), "tree": "another"}) for line in lines]
    cut.write_text("\n".join(other_sources) + "\n")
    assert done_cases(cut, Comparison(options, "").key) == set()


def test_a_way_that_computes_something_else_is_not_timed(tmp_path: Path) -> None:
    options = parser().read([*ARGUMENTS, "--ways", "authors' way", "--cases", CASE, "--out", str(tmp_path / "none.jsonl")])
    comparison = Comparison(options, "")
    name, pair = next(iter(comparison.models.lora.items()))
    assert comparison.models.merged is not None
    comparison.models.lora[name] = (pair[0], 2 * pair[1])
    with pytest.raises(SystemExit, match=r"do not compute the engine's velocity: \{\"authors' way\": "):
        comparison.run()
    assert not (tmp_path / "none.jsonl").exists()


def test_the_authors_way_runs_the_style_encoder_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(TINY, CPU, torch.float32)
    way, runs = RenderedAuthors(models, Evaluations(CPU, "wall"), largest_difference=1e-5), []
    models.vision.register_forward_hook(lambda *_: runs.append(1))
    way.request(TINY.core()[1], seed=3)
    assert len(runs) == TINY.steps
    assert len(way.evaluations.milliseconds()) == TINY.steps


def test_pictures_of_another_seed_are_others() -> None:
    models, case = Models(TINY, CPU, torch.float32), TINY.core()[2]
    first, second = (encode(models, case, seed) for seed in (1, 2))
    assert not torch.equal(first.contents[0], second.contents[0])
    assert not torch.equal(first.style_pixels[0], second.style_pixels[0])
    assert not torch.equal(first.text.tokens, second.text.tokens)
    assert pictures(TINY.core()[1], 1)[0] is None


def test_small_size_is_a_quarter_of_full_size() -> None:
    full, small = SIZES["full"], SIZES["small"]
    for large, little in zip((*full.core(), *full.rest()), (*small.core(), *small.rest()), strict=True):
        counts = dataclasses.astuple(full.tokens(large)), dataclasses.astuple(small.tokens(little))
        assert [count / 4 for count in counts[0]] == list(counts[1])
    assert (small.params.hidden_size, small.params.depth, small.params.depth_single_blocks) == (1024, 3, 6)


def test_a_first_request_is_made_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*ARGUMENTS, "--ways", "ours", "--out", str(tmp_path / "first.jsonl")]
    first_request.run(Comparison(parser().read(given), "the command"), given)
    record = json.loads((tmp_path / "first.jsonl").read_text())
    assert record["benchmark"] == "compare_first"
    assert record["cold_s"] > 0 and record["warm_s"] > 0 and record["compile_s"] >= 0


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    given = [*ARGUMENTS, "--ways", "ours", "--out", str(tmp_path / "none.jsonl")]
    with pytest.raises(SystemExit, match="ours: exit status 1"):
        first_request.run(Comparison(parser().read(given), ""), given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "3x3"], r"--cases: unknown \['3x3'\], expected some of \['64x64-content'"),
        (["--ways", "nobody's"], r"--ways: unknown or not to be had here: \[\"nobody's\"\], expected some of \['ours'"),
        (["--first-of", "nobody's"], r"--first-of: unknown or not to be had here: \"nobody's\""),
    ],
)
def test_unknown_cases_and_ways_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*ARGUMENTS, *arguments, "--out", str(tmp_path / "none.jsonl")])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert missing_reference() == "USO_REFERENCE_DIR names no checkout of it"
    monkeypatch.setenv("USO_REFERENCE_DIR", str(tmp_path))
    assert "expected uso/flux/model.py in" in str(missing_reference())
    assert missing_fp8(CPU) is not None


def test_a_peak_of_memory_is_seen_and_only_that_of_its_own_time() -> None:
    with peak_rise(CPU) as large:
        torch.ones(2**26).sum()
    with peak_rise(CPU) as small:
        pass
    if large.host is None:
        pytest.skip("this system does not let a process reset its peak")
    assert large.host > 0.2
    assert small.host is not None and small.host < 0.1
