"""Whether an image has the same bits alone and in company on this device, by attention backend; measured, not demanded yet."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import output_hash
from benchmarks.workload import Workload, conditions, random_inputs, random_transformer
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule
from uso_engine.verification.measure import relative_error

from .bench import Bench

STEPS = 2


def run(bench: Bench) -> None:
    transformer = random_transformer(bench.workload.params, bench.device, bench.dtype)
    image = job(bench, transformer, bench.workload, seed=1)
    others = {
        "twice": job(bench, transformer, bench.workload, seed=2),
        "beside a small one": job(bench, transformer, bench.small, seed=3),
    }
    for name in ("auto", *(name for name, reason in bench.backends().items() if reason is None)):
        if name != "dense_batched":
            bench.attempt(name, lambda name=name: compared(bench, transformer, name, image, others))  # type: ignore[misc]


def job(bench: Bench, transformer: Transformer, workload: Workload, seed: int) -> ImageJob:
    """A request of a workload's size, admitted."""
    inputs = random_inputs(workload, bench.device, bench.dtype, seed)
    rows, columns = workload.grid
    sigmas = schedule(STEPS, 16 * columns, 16 * rows)
    sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
    noise = torch.randn(16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
    return ImageJob(sequence, noise, tuple(sigmas))


def compared(
    bench: Bench, transformer: Transformer, backend: str, image: ImageJob, others: dict[str, ImageJob]
) -> dict[str, object]:
    """The first image's latent alone, again alone, and behind each of the others."""
    transformer.attention_backend = backend
    alone = latent(transformer, [image])
    found: dict[str, object] = {"hash": output_hash(alone), "again": verdict(latent(transformer, [image]), alone)}
    for name, other in others.items():
        found[name] = verdict(latent(transformer, [other, image]), alone)
    bench.record("gpu_company", {"backend": backend, "tokens": bench.tokens.all, **found})
    return found


def latent(transformer: Transformer, jobs: list[ImageJob]) -> Tensor:
    """The last image's latent after all steps."""
    denoiser = DenoisingRun(transformer, jobs)
    denoiser.run()
    return denoiser.latents()[-1]


def verdict(result: Tensor, alone: Tensor) -> str:
    """Whether the bits are the same, and how far apart they are where not."""
    if torch.equal(result, alone):
        return "same bits"
    return f"differs by {relative_error(result, alone):.2g}"
