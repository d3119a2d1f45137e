"""Trains transformer, style projector and text encoders of uso-tiny by flow matching.

python -m training.transformer --data DIR --out DIR --seconds 4200 --ranks 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from training.arguments import TrainingParser
from training.conditions import has_content, has_style
from training.muon import Muon
from training.parts import Batch, Parts, pack, tokenize, velocity
from training.samples import HELD_OUT, read_samples
from training.schedule import Run
from uso_engine.sampling.schedule import schedule

MODE_PAIRS = (("full", 0.62), ("content", 0.11), ("style", 0.12), ("text", 0.09), ("none", 0.06))
"""A process's batch is of one mode, drawn by these shares."""


def shift_times(uniform: Tensor) -> Tensor:
    """Times spaced as the engine's schedule spaces its steps at 128x128, of evenly spaced ones."""
    half = schedule(2, 128, 128)[1]
    shift = half / (1 - half)
    return shift * uniform / (1 + (shift - 1) * uniform)


def draw_times(count: int, rng: np.random.Generator) -> Tensor:
    """Times by lot: two thirds bell-shaped around the middle, one third even."""
    bell = 1 / (1 + np.exp(-rng.normal(size=count)))
    return shift_times(torch.from_numpy(np.where(rng.random(count) < 0.67, bell, rng.random(count))).float())


class TrainingSet:
    """Latents, levels and token ids of the training set by mode.

    Args:
        data: folder that `training.dataset` and `training.conditions` wrote.
    """

    def __init__(self, data: Path) -> None:
        samples = read_samples(data)
        self.data = data
        self.targets = np.load(data / "target_latents.npy", mmap_mode="r")
        self.contents = np.load(data / "content_latents.npy", mmap_mode="r")
        self.levels = np.load(data / "levels.npy", mmap_mode="r")
        self.t5_ids, self.clip_ids = tokenize(samples.captions)
        self.modes = np.array(samples.modes)
        self.refresh()

    def refresh(self) -> None:
        """Takes in what has been encoded since."""
        count = json.loads((self.data / "latents.json").read_text())["count"]
        modes = self.modes[: min(count, len(self.modes) - HELD_OUT)]
        self.rows = {mode: np.flatnonzero(modes == mode) for mode, _ in MODE_PAIRS}

    def draw(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Batch]:
        """Draws clean packed latents [B, 64, 64] and their conditions, all of one mode."""
        mode = str(rng.choice([name for name, _ in MODE_PAIRS], p=[share for _, share in MODE_PAIRS]))
        rows = np.sort(rng.choice(self.rows[mode], size))
        content = pack(self.contents[rows]) if has_content(mode) else None
        levels = torch.from_numpy(self.levels[rows]).float() if has_style(mode) else None
        return pack(self.targets[rows]), Batch(self.t5_ids[rows], self.clip_ids[rows], content, levels)


def average_gradients(parts: nn.Module) -> None:
    """Averages gradients over the processes; a parameter a process did not use counts as zero there."""
    if not dist.is_initialized():
        return
    parameters = list(parts.parameters())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)


def first_seconds(seconds: float) -> float:
    """The first process's clock, for all."""
    if not dist.is_initialized():
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(value, 0)
    return float(value)


def flow_loss(parts: Parts, clean: Tensor, batch: Batch, rng: np.random.Generator) -> Tensor:
    """Mean square error of the velocity at random times; the guidance input is random here and means nothing yet."""
    times = draw_times(len(clean), rng)
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    noisy = torch.lerp(clean, noise, times[:, None, None])
    guidance = torch.from_numpy(rng.uniform(1, 8, len(clean))).float()
    with torch.autocast("cpu", torch.bfloat16):
        answer = velocity(parts, batch, noisy, times, guidance)
    return (answer.float() - (noise - clean)).square().mean()


def train(rank: int, options: argparse.Namespace) -> None:
    """One process of the training."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{options.meeting}", rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)
    parts = Parts()
    optimizer = Muon(parts.parameter_groups(), options.peak)
    run = Run(
        options.out, options.seconds, options.peak, {"parts": parts}, optimizer, 300.0, writes=rank == 0, agree=first_seconds
    )
    rng = np.random.default_rng((options.seed, rank, run.step))
    data = TrainingSet(options.data)
    total = 0.0
    for step in run.steps():
        loss = flow_loss(parts, *data.draw(rng, options.batch), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parts)
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 50 == 49:
            run.log(loss=total / 50)
            total = 0.0
            data.refresh()


def start_processes(work: Callable[[int, argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Runs `work` in as many processes as `options.ranks` says."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.meeting = options.out / "meeting"
    options.meeting.unlink(missing_ok=True)
    if options.ranks == 1:
        work(0, options)
    else:
        spawn(work, (options,), nprocs=options.ranks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the processes."""
    parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "batch", "ranks", "seed", seconds="4200", peak="3e-3")
    start_processes(train, parser.read(arguments))


if __name__ == "__main__":
    main()
