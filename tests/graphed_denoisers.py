"""Denoisers whose steps become graphs, by a stand-in for capturing."""

from __future__ import annotations

from random_models import small_transformer
from repeated_capture import Repeating
from small_requests import image_jobs

from uso_engine.model.transformer import Transformer
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import Job
from uso_engine.sampling.step_graphs import MIB, GraphMode, StepGraphs


def graphs_of(transformer: Transformer, capturing: Repeating, mode: GraphMode = "on", limit_mib: float = 100.0) -> StepGraphs:
    limit = int(limit_mib * MIB)
    return StepGraphs(transformer, mode, limit_bytes=limit, capturing=capturing, capability=lambda device: (9, 0))


def made(mode: GraphMode = "on", limit_mib: float = 100.0) -> tuple[Denoiser, StepGraphs, Repeating]:
    graphs = graphs_of(transformer := small_transformer(), capturing := Repeating(), mode, limit_mib)
    return Denoiser(transformer, graphs), graphs, capturing


def jobs_of(denoiser: Denoiser, shape: int = 0, steps: int = 6, images: int = 1, *, negative: bool = False) -> list[Job]:
    entries = image_jobs(denoiser._transformer, shape, steps, images, negative=negative)
    return [denoiser.begin(entry) for entry in entries]


def counts(graphs: StepGraphs) -> tuple[int, int, int, int]:
    found = graphs.statistics()
    return found.captured, found.replayed, found.eager, found.kept


def step_often(denoiser: Denoiser, shape: int, steps: int = 4) -> None:
    jobs = jobs_of(denoiser, shape, steps)
    for _ in range(steps):
        denoiser.step(jobs)
    denoiser.forget(jobs)
