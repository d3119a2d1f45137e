"""Tokens per second of sixteen requests of 512 x 512 that are there at once, against one of 1024 x 1024, in turn.

The sixteen take one step each: in the steps that the scheduler puts together under the default `max_step_tokens`, and all in
one. At least 95 % of the single request's rate is aimed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from benchmarks.measure import interleave, output_hash
from benchmarks.workload import Workload, random_transformer
from uso_engine.queue_limits import QueueLimits
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import Job
from uso_engine.scheduling.scheduler import Scheduler, Ticket

from .bench import Bench
from .company import job

COUNT = 16
ROUNDS = 4
ALONE, SCHEDULED, AT_ONCE = "one 1024 x 1024", "16 of 512 x 512, as scheduled", "16 of 512 x 512 in one step"


def run(bench: Bench) -> None:
    transformer = random_transformer(bench.workload.params, bench.device, bench.dtype)
    denoiser = Denoiser(transformer)
    large, small = (without_references(workload) for workload in (bench.workload, bench.small))
    single = [denoiser.begin(job(bench, transformer, large, seed=1))]
    many = [denoiser.begin(job(bench, transformer, small, seed=seed)) for seed in range(1, COUNT + 1)]
    groups = {ALONE: [single], SCHEDULED: list(shared_steps(many)), AT_ONCE: [many]}
    bench.save("steps of the 16, as scheduled", len(groups[SCHEDULED]))
    bench.attempt("bits", lambda: same_bits(denoiser, groups[SCHEDULED], many))
    bench.attempt("tokens per second", lambda: rates(bench, denoiser, groups))


def without_references(workload: Workload) -> Workload:
    return replace(workload, style=0, content=(0, 0))


def shared_steps(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The steps in which the scheduler lets all of them take one each, in its order."""
    scheduler = Scheduler(QueueLimits().max_step_tokens, 0.0)
    by_ticket = {Ticket(one.image.tokens, 1, float(i), ready=True): one for i, one in enumerate(jobs)}
    for ticket in by_ticket:
        scheduler.add(ticket)
    while chosen := scheduler.choose(0.0):
        yield [by_ticket[ticket] for ticket in chosen]
        scheduler.step_taken(chosen)


def stepped(denoiser: Denoiser, groups: Sequence[Sequence[Job]]) -> list[Tensor]:
    """Take the first step of every job, again and again the same: latents and step numbers are put back."""
    velocities: list[Tensor] = []
    for jobs in groups:
        before = [one.latent for one in jobs]
        velocities += denoiser.step(jobs)
        for one, latent in zip(jobs, before, strict=True):
            one.latent, one.index = latent, 0
    return velocities


def same_bits(denoiser: Denoiser, groups: Sequence[Sequence[Job]], many: Sequence[Job]) -> str:
    """Whether the first request's velocity is the same by itself and in both companies.

    Raises:
        ValueError: it is not.
    """
    first = many[0]
    place = [one for group in groups for one in group].index(first)
    found = [stepped(denoiser, [[first]])[0], stepped(denoiser, groups)[place], stepped(denoiser, [many])[0]]
    hashes = [output_hash(velocity) for velocity in found]
    if len(set(hashes)) > 1:
        raise ValueError(f"company changes bits: alone {hashes[0]}, as scheduled {hashes[1]}, all in one step {hashes[2]}")
    return "the same by itself and in company"


def rates(bench: Bench, denoiser: Denoiser, groups: dict[str, list[list[Job]]]) -> dict[str, dict[str, float]]:
    """Tokens per second of each way, and the share of the single request's."""
    steps: dict[str, Callable[[], object]] = {
        name: lambda taken=taken: stepped(denoiser, taken)  # type: ignore[misc]
        for name, taken in groups.items()
    }
    times = interleave(steps, rounds=min(ROUNDS, bench.rounds), device=bench.device, warmup_s=0.3 if bench.on_gpu else 0.0)
    tokens = {name: sum(one.image.tokens for jobs in taken for one in jobs) for name, taken in groups.items()}
    per_s = {name: 1e3 * tokens[name] / timing["median_ms"] for name, timing in times.items()}
    found = {name: {"tokens_per_s": rate, "share": rate / per_s[ALONE]} for name, rate in per_s.items()}
    for name, rate in found.items():
        steps_taken = len(groups[name])
        bench.record("gpu_together", {"way": name, "tokens": tokens[name], "steps": steps_taken, **times[name], **rate})
    return found
