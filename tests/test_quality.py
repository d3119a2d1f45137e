"""Named points of a measured frontier: what stands for a name, what is refused, and that the reference changes nothing."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run as run_command
from PIL import Image

from uso_engine import GenerationRequest, ResearchOptions, USOEngine
from uso_engine.async_engine import AsyncUSOEngine
from uso_engine.config import load_config, parse_config
from uso_engine.config_files import list_configs
from uso_engine.errors import ConfigError
from uso_engine.sampling.sampler import SAMPLERS
from uso_engine.sampling.schedule import schedule, shifted_schedule
from uso_engine.sampling_settings import QualityName

BASE: dict[str, Any] = {"prompt": "x", "seed": 3, "image_size": {"width": 64, "height": 64}}
POINTS = load_config("uso-tiny").quality.named


def test_the_embedded_model_has_all_points_and_they_can_be_sampled() -> None:
    assert list(POINTS) == ["high", "fast", "draft"]
    steps = [point.steps for point in POINTS.values()]
    assert steps == sorted(steps, reverse=True)
    for point in POINTS.values():
        own = None if point.shift is None else shifted_schedule(point.steps, point.shift, point.cosine)
        sigmas = schedule(point.steps, 128, 128) if own is None else own
        SAMPLERS[point.sampler].updates(sigmas)


@pytest.mark.parametrize("name", POINTS)
def test_a_point_is_what_stands_for_it(engine: USOEngine, name: QualityName) -> None:
    point = POINTS[name]
    made = engine.generate(**BASE, quality=name)
    options = ResearchOptions(sampler=point.sampler, shift=point.shift, cosine=point.cosine)
    spelled = engine.generate(**BASE, num_inference_steps=point.steps, research=options)
    assert made.images[0].tobytes() == spelled.images[0].tobytes()
    record = dict(made.parameters)
    assert record.pop("quality") == name
    assert record == spelled.parameters
    assert record["steps_taken"] == point.steps


def test_the_reference_is_the_default_and_changes_nothing(engine: USOEngine) -> None:
    plain = engine.generate(**BASE, num_inference_steps=3)
    named = engine.generate(**BASE, num_inference_steps=3, quality="reference")
    assert plain.images[0].tobytes() == named.images[0].tobytes()
    assert plain.parameters == named.parameters
    assert "quality" not in plain.parameters


@pytest.mark.parametrize(
    ("fields", "research", "says"),
    [
        ({"num_inference_steps": 8}, {}, "leave out num_inference_steps, or quality"),
        ({}, {"sampler": "euler"}, "leave out research.sampler, or quality"),
        ({"num_inference_steps": 8}, {"sigmas": (1.0, 0.5, 0.0)}, "leave out research.sigmas and num_inference_steps"),
    ],
)
def test_what_says_otherwise_is_refused(engine: USOEngine, fields: dict[str, Any], research: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.generate(**BASE, **fields, research=ResearchOptions(**research), quality="fast")
    request = GenerationRequest.model_validate({"prompt": "x", **fields})
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.generate(request, research=ResearchOptions(**research), quality="fast")


@pytest.mark.parametrize("value", ["best", "", 3, True])
def test_another_name_is_refused(engine: USOEngine, value: object) -> None:
    with pytest.raises(ValueError, match="quality must be one of 'reference', 'high', 'fast', 'draft', got"):
        engine.generate(**BASE, quality=value)  # type: ignore[arg-type]


def test_a_model_that_was_not_measured_has_no_points() -> None:
    """Points are measured with a model; a configuration of another one has none until its frontier is."""
    measured = {name for name in list_configs() if load_config(name).quality.named}
    assert measured == {"uso-tiny"}


def test_a_point_that_was_not_measured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    config = load_config("uso-tiny")
    fewer = config.model_copy(update={"quality": config.quality.model_copy(update={"fast": None})})
    with (
        USOEngine.from_config(fewer, device="cpu") as engine,
        pytest.raises(
            ValueError, match="'fast' is a measured point, and configuration uso-tiny has only 'reference', 'high', 'draft'"
        ),
    ):
        engine.generate(**BASE, quality="fast")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"best": {"steps": 4}}, "unknown key 'quality.best'"),
        ({"fast": {"steps": 0}}, "quality.fast.steps"),
        ({"fast": {"sampler": "ab2"}}, "quality.fast.steps is required"),
        ({"fast": {"steps": 4, "sampler": "heun"}}, "quality.fast.sampler"),
        ({"fast": {"steps": 4, "cosine": 0.5}}, "quality.fast: cosine = 0.5 spaces the steps of a shift's schedule"),
    ],
)
def test_a_table_that_makes_no_point(table: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config({"name": "x", "transformer": {"checkpoint": "y"}, "quality": table})


def test_asynchronous_engines_take_it_too() -> None:
    async def made() -> object:
        async with AsyncUSOEngine.from_config("uso-tiny", device="cpu") as engine:
            result = await engine.generate(**BASE, quality="draft")
            with pytest.raises(ValueError, match="quality must be one of"):
                async for _ in engine.stream(**BASE, quality="poor"):  # type: ignore[arg-type]
                    pass
            return result.parameters["quality"]

    assert asyncio.run(made()) == "draft"


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "made.png"
    arguments = ["generate", "--prompt", "x", "--size", "64x64", "--seed", "3", "--device", "cpu", "-o", str(path)]
    arguments.append("--parameters")
    code, printed = run_command(*arguments, "--quality", "draft")
    assert code == 0, printed
    with Image.open(path) as picture:
        assert '"quality": "draft"' in f"{dict(picture.getexif())} {picture.info}"
    code, printed = run_command(*arguments, "--quality", "draft", "--steps", "9")
    assert code != 0
    assert "leave out num_inference_steps, or quality" in printed
    code, printed = run_command("generate", "--prompt", "x", "--quality", "fast", "--config", "uso-flux-dev")
    assert code != 0
    assert "configuration uso-flux-dev has only 'reference'" in printed
