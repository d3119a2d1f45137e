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
from benchmarks.compare.plots import PLOT, fit_batch, fit_tokens
from benchmarks.compare.run import Comparison, done_cases, main, parser
from benchmarks.compare.tables import NO_GPU, TABLES, current, overview, ratio
from benchmarks.records import hardware
from uso_engine.model.roofline import step_flops

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
    assert len(ours["sha256"]) == len(theirs["sha256"]) == 64
    assert 0 < ours["product_ms"]["p20_ms"] <= ours["product_ms"]["p80_ms"] and ours["product_ms"] == theirs["product_ms"]


def test_several_pictures_of_a_peer_are_one_evaluation(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    case = "64x64-content-style-2-images"
    both, one = records[case, "diffusers"], records[CASE, "diffusers"]
    assert both["needed_flops"] == 2 * one["needed_flops"]
    assert records[case, "authors' way"]["needed_flops"] == one["needed_flops"]
    assert both["difference"] < 1e-5


def test_a_run_goes_on_where_it_was_cut_off(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = {"product_ms": {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}}
    lines = [json.dumps({**json.loads(line), **steady}) for line in out.read_text().splitlines()]
    cut = tmp_path / "records.jsonl"
    cut.write_text("\n".join(lines) + "\n")
    main([*ARGUMENTS, "--cases", CASE, "--out", str(cut)])
    assert "every case has its records" in capsys.readouterr().out
    # The second case had begun: one of its ways is missing.
    cut.write_text("\n".join(lines[:-1]) + "\n")
    options = parser().read([*ARGUMENTS, "--out", str(cut), "--cases", CASE, "64x64-content-style-2-images"])
    assert [case.name for case in Comparison(options, "").cases] == ["64x64-content-style-2-images"]
    other_sources = [json.dumps({**json.loads(line), "tree": "another"}) for line in lines]
    cut.write_text("\n".join(other_sources) + "\n")
    assert done_cases(cut, Comparison(options, "").key) == set()


def test_guidance_is_the_sizes_in_every_way(
    records: dict[tuple[str, str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(TINY, guidance=2.0))
    out = tmp_path / "records.jsonl"
    main([*ARGUMENTS, "--ways", "authors' way", "diffusers", "--rounds", "1", "--cases", CASE, "--out", str(out)])
    for record in map(json.loads, out.read_text().splitlines()):
        assert record["difference"] < 1e-5 and record["sha256"] != records[CASE, record["way"]]["sha256"]


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


def test_weights_are_the_same_in_every_process() -> None:
    """Or the hash of a picture would say nothing to whoever measures again."""
    hashes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, models = torch.get_rng_state(), Models(TINY, CPU, torch.float32)
        hashes.append(
            RenderedAuthors(models, Evaluations(CPU, "wall"), largest_difference=1e-5).request(TINY.core()[2], seed=3)
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert hashes[0] == hashes[1]


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


def test_a_process_prints_the_seconds_of_its_first_two_requests(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, "--first-of", "ours"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"first_s", "second_s"} and min(found.values()) > 0


def test_two_processes_share_caches_that_were_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python that notes its arguments and how much the caches hold, and leaves something there."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$@" >>{tmp_path}/arguments
mkdir -p "$TRITON_CACHE_DIR" && held=$(ls "$TRITON_CACHE_DIR" | wc -l) && touch "$TRITON_CACHE_DIR/kernel"
test "$held" = 0 && echo '{{"first_s": 9.0, "second_s": 2.0}}' || echo '{{"first_s": 4.0, "second_s": 2.5}}'
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    given = [*ARGUMENTS, "--ways", "ours", "diffusers", "--first-requests", "--out", str(tmp_path / "first.jsonl")]
    first_request.run(Comparison(parser().read(given), "the command"), given)
    records = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    assert [(r["benchmark"], r["way"]) for r in records] == [("compare_first", "ours"), ("compare_first", "diffusers")]
    assert all((r["cold_s"], r["warm_s"], r["second_s"], r["compile_s"]) == (9.0, 4.0, 2.5, 5.0) for r in records)
    started = (tmp_path / "arguments").read_text().splitlines()
    assert [line.rpartition("--first-of ")[2] for line in started] == ["ours", "ours", "diffusers", "diffusers"]
    assert not any("--first-requests" in line for line in started)


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


def test_the_tables_and_the_plot_show_what_was_recorded(out: Path) -> None:
    steady = {"product_ms": {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.1}}
    found = [{**json.loads(line), **steady} for line in out.read_text().splitlines()]
    shown = {table.marker: table.text(found) for table in TABLES if table.document != "README.md"}
    overview_text = overview(found)
    assert "| 64x64-content-style, L = 96 |" in overview_text
    assert "`python -m benchmarks.compare --size tiny" in overview_text and NO_GPU in overview_text
    # Two and a half times is aimed at in bfloat16 alone.
    assert "diffusers takes at least" in overview_text and "authors' way takes at least" not in overview_text
    assert "2.5 is " in overview([{**record, "dtype": "bfloat16"} for record in found])
    assert shown["compare"].count("\n| ") == 1 + len(found)
    assert "| authors' code | USO_REFERENCE_DIR names no checkout of it |" in shown["compare not run"]
    assert "sglang" in shown["compare not run"] and "Ceilings of" in shown["compare"]
    assert shown["compare first"] == "Pending: not measured yet."
    picture = PLOT.text(found)
    # Of each way a mark in the legend and two numbers of pictures; one number of tokens makes no curve.
    assert picture.count("<circle") == 4 + 8
    assert PLOT.text([*found, {"benchmark": "other"}]) == picture
    alone = [{**record, "dtype": "bfloat16"} for record in found if record["images"] == 1]
    assert PLOT.text([*found, *alone]) == picture  # A single case makes no curve.
    assert "Pending" in PLOT.text([])


def test_a_case_of_a_machine_that_did_not_keep_its_rate_is_left_out(out: Path) -> None:
    def timed(slowest_ms: float, **changed: object) -> list[dict[str, Any]]:
        product_ms = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": slowest_ms}
        return [{**json.loads(line), "product_ms": product_ms, **changed} for line in out.read_text().splitlines()]

    steady, unsteady = timed(1.15), timed(2.4, image_s=7.77)
    cases = f"Left out, {hardware(steady[0])}, tiny, float32: {CASE}, {CASE}-2-images."
    assert [record["image_s"] for record in current([*steady, *unsteady])] == [record["image_s"] for record in current(steady)]
    assert "Left out" not in overview([*steady, *unsteady])
    told = overview([*unsteady, *timed(1.0, case="512x512-style")])
    assert (
        f"{cases} Between their requests the same product took up to 2.4 times as long" in told
        and "7.77" not in told
        and "512x512-style, L = 96" in told
    )
    assert "Left out" in overview(unsteady) and not current(unsteady)


@pytest.mark.parametrize(
    ("value", "said"), [(1.0, "the same"), (1.014, "the same"), (0.986, "the same"), (1.016, "1.02 times"), (0.9, "0.90 times")]
)
def test_nothing_is_claimed_of_a_difference_that_two_runs_have(value: float, said: str) -> None:
    assert ratio(value) == said


def test_fits_find_the_curve_that_points_lie_on() -> None:
    def line(tokens: int, images: int, step_ms: float, request_ms: float) -> dict[str, Any]:
        case = f"64x64-content-style{f'-{images}-images' if images > 1 else ''}"
        timings = {"step_ms": {"median_ms": step_ms}, "request_ms": {"median_ms": request_ms}}
        return {"way": "ours", "case": case, "tokens": tokens, "images": images, **timings}

    points = [line(n, 1, 2 * n + 3 * n**2 / 1000, 3000.0) for n in (100, 500, 900)]
    assert fit_tokens(points, "ours") == pytest.approx((2, 3))
    assert fit_batch([line(100, n, 1.0, 1e3 * (1 + 2 * n)) for n in (1, 2, 4)], "ours") == pytest.approx((1, 2))
    assert fit_tokens(points[:2], "ours") is None and fit_batch(points, "ours") is None


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
