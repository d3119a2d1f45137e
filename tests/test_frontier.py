"""Work against quality: what a run keeps, what it goes on from, and what its numbers mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.frontier import run
from benchmarks.frontier.cases import SIDE, make
from benchmarks.frontier.flops import MERGED, TOKENS, denoising_flops
from benchmarks.frontier.judgement import Judgement, means
from benchmarks.frontier.plot import draw
from benchmarks.frontier.settings import EXACT, FEWER_STEPS, REFERENCE, SETTINGS, Setting
from benchmarks.frontier.tables import frontier, points
from benchmarks.frontier.work import Group, Work
from benchmarks.records import load
from uso_engine.comparison.image_metrics import coloured_otherwise
from uso_engine.model.params import TransformerParams
from uso_engine.sampling.family import FAMILIES
from uso_engine.sampling.sampler import SAMPLERS

SEEN = Judgement(1.0, 1.0, 1.0, 40.0, 0.99, 0.0, 38.0)
MISSED = replace(SEEN, content=0.0, psnr_db=20.0, visible=1.0)


def test_a_run_is_gone_on_with_and_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun again with one more setting it makes only that, and the record is that of a run in one go."""
    monkeypatch.setattr(run, "SETTINGS", (Setting(2),))
    monkeypatch.setattr(run, "EXACT", Setting(4, "ab2"))
    monkeypatch.setattr(run, "REFERENCE", Setting(3))
    made: list[str] = []

    def counted(pipeline: Any, cases: Any, setting: Setting, seeds: Any) -> Any:
        made.append(setting.name)
        return make(pipeline, cases, setting, seeds)

    monkeypatch.setattr(run, "make", counted)
    arguments = ["--triplets", "2", "--seeds", "1", "--groups", str(tmp_path / "work"), "--out", str(tmp_path / "out.jsonl")]
    run.main(arguments)
    assert made == ["ab2 4", "euler 3", "euler 2"]
    monkeypatch.setattr(run, "SETTINGS", (Setting(2), Setting(3, "ab2")))
    run.main([*arguments, "--sheet", str(tmp_path / "sheet.png")])
    assert made[3:] == ["ab2 3"]
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert [row["name"] for row in second["rows"]] == ["euler 3", "euler 2", "ab2 3"]
    assert first["rows"] == second["rows"][:2]
    assert (second["triplets"], second["pictures"]) == (2, 2)
    assert second["rows"][0]["psnr_db"][0] == 99.0
    assert second["rows"][0]["visible"][0] == 0.0
    assert second["rows"][1]["psnr_db"][0] < 40
    gflops = [row["denoising_gflop"] for row in second["rows"]]
    assert gflops[0] == gflops[2] > gflops[1] > 0.6 * gflops[0]
    assert second["rows"][0]["request_gflop"] > gflops[0] + 0.1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 3 * 96
    assert "| ab2 3 |" in frontier([second])
    assert draw([second]).count("<circle") == 3 * 3


def test_time_that_is_over_before_anything_is_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no group is complete in .*: expected every setting of at least one; give more"):
        run.main(["--minutes", "0.000001", "--groups", str(tmp_path), "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_half_done_group_and_another_models_are_not_counted(tmp_path: Path) -> None:
    work = Work(tmp_path, "this model")
    done, half = Group(0, 1, 0), Group(8, 1, 0)
    for group, setting in ((done, REFERENCE), (done, Setting(8)), (half, REFERENCE)):
        work.add(group, setting, [SEEN], 1.0, 2.0)
    again = Work(tmp_path, "this model")
    assert again.complete((REFERENCE, Setting(8))) == [done]
    assert again.judged(REFERENCE, [done]) == {0: [SEEN]}
    assert again.seconds(REFERENCE, [done]) == (1.0, 2.0)
    assert not Work(tmp_path, "another model").has(done, REFERENCE)


def test_seeds_of_the_noise_are_the_evaluations_and_never_repeat() -> None:
    found = [seed for group in run.groups(96, 3) for seed in group.seeds]
    assert found[:96] == list(range(1, 97))
    assert len(set(found)) == 3 * 96


def test_means_have_intervals_over_triplets() -> None:
    """Twenty triplets, half of them missed: an interval as wide as that of twenty, though there are four pictures of each."""
    judged = {i: [SEEN if i % 2 else MISSED] * 4 for i in range(20)}
    found = means(judged, {i: [SEEN] * 4 for i in range(20)})
    assert (found["content"][0], found["content_change"][0]) == (0.5, -0.5)
    assert (found["style"], found["style_change"]) == ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    low, high = found["content"][1:]
    assert 0.25 <= low <= 0.35  # 0.5 - 1.96 * sqrt(0.25 / 20) = 0.28
    assert 0.65 <= high <= 0.75
    assert found["psnr_db"][0] == 30.0
    with pytest.raises(ValueError, match="as many seeds each"):
        means(judged, {i: [SEEN] for i in range(20)})


def test_settings_are_distinct_and_can_be_sampled() -> None:
    every = (EXACT, REFERENCE, *SETTINGS)
    assert len({setting.name for setting in every}) == len(every)
    assert {Setting(steps) for steps in (24, 20, 16, 12, 8)} <= set(SETTINGS)
    assert set(FEWER_STEPS) <= {setting.steps for setting in SETTINGS if setting.option == "euler"}
    for setting in every:
        SAMPLERS[setting.sampler].updates(setting.sigmas(SIDE, SIDE, FAMILIES["uso"]))


def test_work_grows_with_steps_and_tokens() -> None:
    params = TransformerParams(
        hidden_size=192, num_heads=3, depth=2, depth_single_blocks=2, axes_dim=(16, 24, 24), mlp_ratio=3.0
    )
    one, two = (denoising_flops(params, Setting(steps, "ab2")) for steps in (10, 20))
    assert 1.9 < two / one < 2.0
    assert denoising_flops(params, Setting(10), replace(TOKENS, content=0)) < 0.8 * one
    merged = denoising_flops(params, Setting(10, "ab2", text_padding="merge"))
    assert MERGED.keys == TOKENS.all
    assert 0.91 < merged / one < 0.94


def test_colours_apart_are_counted() -> None:
    """One level of 255 is far under the distance, twenty are over it, and red on grey is."""
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    assert coloured_otherwise(grey, Image.new("RGB", (16, 16), (101, 101, 101))) == 0.0
    assert coloured_otherwise(grey, Image.new("RGB", (16, 16), (120, 120, 120))) == 1.0
    half = grey.copy()
    half.paste((255, 0, 0), (0, 0, 8, 16))
    assert coloured_otherwise(grey, half) == 0.5
    # sRGB's red is L* 53.2, a* 80.1, b* 67.2: 104.6 from a grey of its own lightness.
    red, same = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (127, 127, 127))
    assert coloured_otherwise(red, same, distance=104.0) == 1.0
    assert coloured_otherwise(red, same, distance=105.5) == 0.0


def test_every_named_point_is_in_the_record() -> None:
    """A configuration's point without a measured loss would be a name for a guess."""
    text = points([record for record in load() if record["benchmark"] == "frontier"])
    assert "| high |" in text
    assert "not measured" not in text
