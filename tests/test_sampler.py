"""Samplers that remember: their order on a flow with a known answer, their bits in any company, and what they refuse."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run as run_command
from PIL import Image
from random_models import SMALL, drawn_conditions, small_transformer

from uso_engine import ResearchOptions, USOEngine
from uso_engine.config import load_config, parse_config
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import ImageJob, Job
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.multistep import Multistep
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.sampler import SAMPLERS, SamplerName
from uso_engine.sampling.schedule import schedule, shifted_schedule

REMEMBERING: tuple[SamplerName, ...] = ("ab2", "unipc")
MEAN, DEVIATION = 0.7, 0.4
SMALL_REQUEST: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 5}


def clean(x: float, sigma: float) -> float:
    """The expected clean value at a point of the flow from N(0, 1) to N(MEAN, DEVIATION^2)."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return MEAN + (1 - sigma) * DEVIATION**2 / variance * (x - (1 - sigma) * MEAN)


def carried(x: float, start: float, end: float) -> float:
    """Where that flow carries a point exactly: its place in units of the deviation stays."""
    deviations = [math.hypot((1 - sigma) * DEVIATION, sigma) for sigma in (start, end)]
    return (1 - end) * MEAN + deviations[1] / deviations[0] * (x - (1 - start) * MEAN)


def error(name: SamplerName, sigmas: list[float], x: float = 1.3) -> float:
    """How far a sampler's last value is from the exact one; the torch part takes the steps."""
    multistep = Multistep.begin(name, sigmas)
    latent = torch.full((1, 1), x, dtype=torch.float64)
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        velocity = (latent - clean(float(latent), sigma)) / sigma
        if multistep is None:
            latent = latent + (following - sigma) * velocity
        else:
            latent, multistep = multistep.advance(i, latent, velocity)
    return abs(float(latent) - carried(x, sigmas[0], sigmas[-1]))


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("unipc", 2)])
def test_order_on_a_flow_whose_answer_is_known(name: SamplerName, order: int, start: float, end: float) -> None:
    """Twice the steps divide the error by 2^order; UniPC's corrector makes it 3."""
    errors = [error(name, [start + (end - start) * i / n for i in range(n + 1)]) for n in (128, 256)]
    found = math.log2(errors[0] / errors[1])
    assert order - 0.05 < found < (3.05 if name == "unipc" else order + 0.05)


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("shift", [1.0, 1.58, 3.0])
def test_on_the_engines_own_schedules_they_beat_euler(name: SamplerName, shift: float) -> None:
    """From sigma 1 to 0, where the ends are of first order: a fifth of Euler's error, and never more than Euler's."""
    euler, found = ([error(each, shifted_schedule(n, shift)) for n in (8, 16, 32, 64, 128)] for each in ("euler", name))
    ratios = [a / b for a, b in zip(found, euler, strict=True)]
    assert max(ratios) < 1
    assert max(ratios[2:]) < 0.2


def test_unequal_steps_keep_the_order() -> None:
    """Widths that alternate by a factor of 2: weights for equal steps would be of first order."""
    for name in REMEMBERING:
        errors = []
        for pairs in (64, 128):
            sigmas = [0.9]
            for _ in range(pairs):
                sigmas += [sigmas[-1] - 0.8 / pairs / 3, sigmas[-1] - 0.8 / pairs]
            errors.append(error(name, sigmas))
        assert math.log2(errors[0] / errors[1]) > 1.9, name


def test_a_constant_velocity_is_followed_exactly() -> None:
    """Every step of every sampler carries a straight line where it leads."""
    for name, sampler in SAMPLERS.items():
        sigmas = schedule(9, 512, 512)
        x, answers = 3.0, list[float]()
        for (sigma, following), update in zip(pairwise(sigmas), sampler.updates(sigmas), strict=True):
            answers.insert(0, 2.0 if sampler.answer == "velocity" else x - sigma * 2.0)
            x = update.of_latent * x + sum(w * a for w, a in zip(update.of_answers, answers, strict=False))
            assert x == pytest.approx(3.0 + 2.0 * (following - 1), abs=1e-12), name


def image_job(transformer: Transformer, sampler: SamplerName, steps: int, shape: int, *, negative: bool = False) -> ImageJob:
    grid = ((4, 4), (3, 5), (2, 6))[shape]
    sigmas = tuple(schedule(steps, 512, 512))
    sequences = [
        admit(transformer, drawn_conditions(SMALL, seed=seed, text=21, style=3, contents=((4, 6),)), grid, sigmas, 4.0)
        for seed in ((shape, 9) if negative else (shape,))
    ]
    noise = draw_noise(16 * grid[1], 16 * grid[0], 5 + shape)
    return ImageJob(sequences[0], noise, sigmas, sequences[1] if negative else None, 2.5, sampler)


def alone(transformer: Transformer, image: ImageJob) -> torch.Tensor:
    run = DenoisingRun(transformer, [image])
    run.run()
    return run.latents()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_in_any_company_joining_and_leaving_midway(dtype: torch.dtype) -> None:
    """Every sampler beside every other, with and without negative prompts, at different steps, one that is cancelled midway."""
    transformer = small_transformer(dtype=dtype)
    images = [image_job(transformer, name, 4 + i, i % 3, negative=i % 2 == 1) for i, name in enumerate(SAMPLERS)]
    expected = [alone(transformer, image) for image in images]
    denoiser = Denoiser(transformer)
    jobs: list[Job] = [denoiser.begin(image) for image in images]
    cancelled = denoiser.begin(image_job(transformer, "unipc", 6, 0))
    running: list[Job] = []
    for round_ in range(20):
        if round_ < len(jobs):
            running.insert(0, jobs[round_])
        company = [*running, cancelled] if round_ in (1, 2) else running
        if company:
            denoiser.step(company)
        running = [job for job in running if job.index < job.steps]
    assert cancelled.index == 2
    for job, latent, name in zip(jobs, expected, SAMPLERS, strict=True):
        assert torch.equal(job.unpacked(), latent), name


def test_euler_is_what_it_was() -> None:
    """The default computes what the sampler's table says, by the kernel that it always had; nothing is remembered."""
    transformer = small_transformer()
    job = Denoiser(transformer).begin(image_job(transformer, "euler", 3, 0))
    assert job.multistep is None
    updates = SAMPLERS["euler"].updates(job.image.sigmas)
    assert [update.of_answers[0] for update in updates] == pytest.approx(job.deltas.tolist(), rel=1e-6)


def test_a_step_that_fails_leaves_a_job_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = small_transformer()
    denoiser = Denoiser(transformer)
    jobs = [denoiser.begin(image_job(transformer, name, 5, 0)) for name in ("ab2", "unipc")]
    denoiser.step(jobs)
    before = [(job.index, job.latent.clone(), job.multistep) for job in jobs]
    taken = Multistep.advance

    def fails(multistep: Multistep, *arguments: Any) -> Any:
        if multistep.sampler == "unipc":
            raise torch.OutOfMemoryError("no memory for the answers")
        return taken(multistep, *arguments)

    monkeypatch.setattr(Multistep, "advance", fails)
    with pytest.raises(torch.OutOfMemoryError):
        denoiser.step(jobs)
    for job, (index, latent, multistep) in zip(jobs, before, strict=True):
        assert (job.index, job.multistep) == (index, multistep)
        assert torch.equal(job.latent, latent)


def test_what_on_step_puts_in_place_is_gone_on_from() -> None:
    """Correctors are sums of answers, so a caller's change of the latent is not taken back by the next step."""
    transformer = small_transformer()
    for name in REMEMBERING:
        moved, left = (DenoisingRun(transformer, [image_job(transformer, name, 5, 0)]) for _ in range(2))
        for run in (moved, left):
            run.step()
        moved.latents()
        moved._jobs[0].latent += 1.0
        moved._jobs[0].latent -= 1.0 - 1e-3
        update = SAMPLERS[name].updates(schedule(5, 512, 512))[1]
        first, second = (run.step().latents[0] for run in (moved, left))
        share = update.of_latent + (update.of_answers[0] if SAMPLERS[name].answer == "clean" else 0.0)
        assert float((first - second).mean()) == pytest.approx(1e-3 * share, rel=0.5), name


@pytest.mark.parametrize(
    ("name", "sigmas", "says"),
    [
        ("ab2", (1.0, 0.0), "sampler 'ab2' takes no step of second order in 1 steps from sigma 1 to 0"),
        ("unipc", (1.0, 0.5, 0.0), "sampler 'unipc' takes no step of second order in 2 steps"),
        ("ab2", (1.0, 0.95, 0.5, 0.0), "step 1, from 0.95 to 0.5, is 9.0 times as wide as the one before"),
        ("unipc", (0.9, 0.89, 0.5, 0.3), "sampler 'unipc' cannot take these sigmas: step 1, from 0.89 to 0.5, is"),
    ],
)
def test_sigmas_that_a_sampler_cannot_take(name: SamplerName, sigmas: tuple[float, ...], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        SAMPLERS[name].updates(sigmas)
    SAMPLERS["euler"].updates(sigmas)


@pytest.mark.parametrize("name", REMEMBERING)
def test_every_schedule_of_the_engine_is_taken(name: SamplerName) -> None:
    for steps in range(4, 51):
        shifted = [shifted_schedule(steps, shift, cosine) for shift in (1.0, 3.16) for cosine in (0.0, 0.25, 1.0)]
        for sigmas in (schedule(steps, 1024, 1024), *shifted):
            assert len(SAMPLERS[name].updates(sigmas)) == steps


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
    arguments = [
        "generate",
        "--prompt",
        "x",
        "--size",
        "64x64",
        "--steps",
        "4",
        "--seed",
        "3",
        "--device",
        "cpu",
        "-o",
        str(path),
    ]
    code, printed = run_command(*arguments, "--sampler", "ab2", "--shift", "2", "--cosine", "0.25", "--parameters")
    assert code == 0, printed
    with Image.open(path) as picture:
        written = f"{dict(picture.getexif())} {picture.info}"
    assert all(part in written for part in ('"sampler": "ab2"', '"shift": 2.0', '"cosine": 0.25'))
    code, printed = run_command(*arguments, "--sampler", "heun")
    assert code != 0
    assert "must be one of 'euler', 'ab2', 'unipc', got 'heun'" in printed
