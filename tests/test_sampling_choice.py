"""A request's way from noise to its latent: what it and its configuration say, and what its picture says of it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import run as run_command
from command_line import small_picture
from PIL import Image
from streamed_engines import plain_and_streamed

from uso_engine import GenerationResult, ResearchOptions, USOEngine
from uso_engine.config import load_config, parse_config
from uso_engine.sampling.sampler import SamplerName
from uso_engine.sampling.step import Step

REMEMBERING: tuple[SamplerName, ...] = ("ab2", "unipc")
SMALL_REQUEST: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 5}


def test_a_request_chooses_its_sampler_and_its_picture_says_so(engine: USOEngine, content: Image.Image) -> None:
    base: dict[str, Any] = {"prompt": "x", "seed": 3, "images": [content], "negative_prompt": "blue", **SMALL_REQUEST}
    plain = engine.generate(**base)
    assert "sampler" not in plain.parameters and "shift" not in plain.parameters
    results = [engine.generate(**base, research=ResearchOptions(sampler=name)) for name in REMEMBERING]
    shifted = engine.generate(**base, research=ResearchOptions(shift=3.0))
    assert [result.parameters["sampler"] for result in results] == list(REMEMBERING)
    assert shifted.parameters["shift"] == 3.0
    assert len({result.images[0].tobytes() for result in (plain, *results, shifted)}) == 4
    assert json.loads(json.dumps(results[0].parameters))["sampler"] == "ab2"
    again = engine.generate(**base, research=ResearchOptions(sampler="euler"))
    assert again.images[0].tobytes() == plain.images[0].tobytes()


def test_weights_that_come_from_the_host_give_the_same_picture(content: Image.Image) -> None:
    """In 8 bits, with everything streamed and a negative prompt: what a sampler remembers is the job's."""
    base: dict[str, Any] = {"prompt": "x", "seed": 3, "images": [content], "negative_prompt": "blue", **SMALL_REQUEST}
    with plain_and_streamed("int8", "cpu") as engines:
        for name in REMEMBERING:
            made = [engine.generate(**base, research=ResearchOptions(sampler=name)).images[0] for engine in engines]
            assert made[0].tobytes() == made[1].tobytes(), name


def test_a_request_that_is_cancelled_midway_leaves_the_others_their_bits(engine: USOEngine) -> None:
    """Threads with a sampler each: one raises at its third step while the others go on."""
    names: list[SamplerName] = ["ab2", "unipc", "euler"]
    alone = [engine.generate(prompt="x", seed=3, **SMALL_REQUEST, research=ResearchOptions(sampler=name)) for name in names]

    def cancel(step: Step) -> None:
        if step.index == 2:
            raise KeyError("enough")

    def ask(place: int) -> object:
        research = ResearchOptions(sampler=names[place % len(names)])
        if place == len(names):
            with pytest.raises(KeyError, match="enough"):
                engine.generate(prompt="other", seed=5, **SMALL_REQUEST, research=research, on_step=cancel)
            return None
        return engine.generate(prompt="x", seed=3, **SMALL_REQUEST, research=research)

    with ThreadPoolExecutor(len(names) + 1) as threads:
        together = list(threads.map(ask, range(len(names) + 1)))
    for name, one, made in zip(names, alone, together, strict=False):
        assert isinstance(made, GenerationResult)
        assert made.images[0].tobytes() == one.images[0].tobytes(), name


def test_a_configuration_chooses_for_requests_that_do_not(content: Image.Image) -> None:
    config = load_config("uso-tiny").model_copy(
        update={
            "sampling": parse_config({"name": "x", "transformer": {"checkpoint": "y"}, "sampling": {"sampler": "ab2"}}).sampling
        }
    )
    with USOEngine.from_config(config, device="cpu") as engine:
        engine.warmup()
        made = engine.generate(prompt="x", seed=3, **SMALL_REQUEST)
        other = engine.generate(prompt="x", seed=3, **SMALL_REQUEST, research=ResearchOptions(sampler="euler"))
        assert made.parameters["sampler"] == "ab2"
        assert "sampler" not in other.parameters
        with pytest.raises(ValueError, match="but the sampler is 'ab2'; give sampler='euler' with it"):
            engine.generate(prompt="x", **SMALL_REQUEST, research=ResearchOptions(reference_numerics=True))


@pytest.mark.parametrize(
    ("fields", "research", "says"),
    [
        ({}, {"sampler": "ab2", "reference_numerics": True}, "are those of the authors' Euler steps, but the sampler is 'ab2'"),
        ({}, {"sigmas": (1.0, 0.5, 0.0), "shift": 2.0}, "research.sigmas and research.shift=2 both say what the sigmas are"),
        ({}, {"sampler": "ab2", "sigmas": (1.0, 0.99, 0.5, 0.0)}, "sampler 'ab2' cannot take these sigmas"),
        ({"num_inference_steps": 2}, {"sampler": "unipc"}, "sampler 'unipc' takes no step of second order in 2 steps"),
        ({}, {"sigmas": (1.0, 0.5, 0.0), "shift": 2.0, "cosine": 0.5}, "research.sigmas and research.shift=2 both say"),
    ],
)
def test_options_that_exclude_each_other(
    engine: USOEngine, fields: dict[str, Any], research: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.generate(prompt="x", **(SMALL_REQUEST | fields), research=ResearchOptions(**research))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "heun"}, "research.sampler must be one of 'euler', 'ab2', 'unipc', got 'heun'"),
        ({"sampler": 3}, "research.sampler must be one of"),
        ({"shift": 0}, "research.shift must be a number over 0 and at most 100, got 0"),
        ({"shift": True}, "research.shift must be a number over 0 and at most 100, got true"),
        ({"shift": 1.0, "cosine": 1.5}, "research.cosine must be a number from 0 to 1, got 1.5"),
        ({"cosine": 0.5}, "research.cosine=0.5 spaces the steps of a shift's schedule; give research.shift with it"),
        ({"shift": float("nan")}, "research.shift must be a number over 0 and at most 100, got NaN"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ResearchOptions(**options)


def test_the_command_line_chooses_too(tmp_path: Path) -> None:
    path = tmp_path / "made.png"
    arguments = small_picture(path)
    code, printed = run_command(*arguments, "--sampler", "ab2", "--shift", "2", "--cosine", "0.25", "--parameters")
    assert code == 0, printed
    with Image.open(path) as picture:
        written = f"{dict(picture.getexif())} {picture.info}"
    assert all(part in written for part in ('"sampler": "ab2"', '"shift": 2.0', '"cosine": 0.25'))
    code, printed = run_command(*arguments, "--sampler", "heun")
    assert code != 0
    assert "must be one of 'euler', 'ab2', 'unipc', got 'heun'" in printed
