"""What a sampler remembers belongs to its job: bits in any company, steps that fail, and latents that a caller changes."""

from typing import Any

import pytest
import torch
from random_models import SMALL, drawn_conditions, small_transformer

from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import ImageJob, Job
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.multistep import Multistep
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.sampler import SAMPLERS, SamplerName
from uso_engine.sampling.schedule import schedule

REMEMBERING: tuple[SamplerName, ...] = ("ab2", "unipc")


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


def test_velocities_handed_out_are_velocities() -> None:
    """What `on_step` sees of a sampler that turns answers into clean latents is the model's velocity, as Euler's is."""
    transformer = small_transformer()
    first = [DenoisingRun(transformer, [image_job(transformer, name, 5, 0)]).step().velocities[0] for name in SAMPLERS]
    for velocity in first[1:]:
        assert torch.equal(velocity, first[0])


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
