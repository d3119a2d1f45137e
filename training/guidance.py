"""Teaches the guidance input while the training goes on: the trained model's own guided answer is what the scale asks for.

    python -m training.guidance --data DIR --start DIR --out DIR --seconds 1900 --ranks 2

A guided answer is v = v_all + (w - 1) (v_all - v_none): v_none sees neither prompt nor references, and w = 1 + (g - 1) STRENGTH
for a guidance scale g. The model of the stage before gives the difference, the drawing itself the v_all in front of it, so that
one loss both goes on with flow matching and teaches what g does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from training.arguments import TrainingParser
from training.muon import Muon
from training.parts import Batch, Parts, tokenize, velocity
from training.schedule import Run
from training.transformer import TrainingSet, average_gradients, draw_times, first_seconds, start_processes

STRENGTH = 0.5
"""A guidance scale of 4, the default, is a weight of 2.5 on this small model: 4 itself would be far too much for it."""

PLAIN_SHARE = 0.25
"""Share of batches with scale 1, where the answer is the plain one and no teacher is asked."""


def empty_batch(size: int) -> Batch:
    """No prompt and no references."""
    t5_ids, clip_ids = tokenize([""])
    return Batch(t5_ids.expand(size, -1), clip_ids.expand(size, -1), None, None)


def guidance_difference(teacher: Parts, batch: Batch, latents: Tensor, times: Tensor) -> Tensor:
    """What the conditions change in the teacher's answer, [B, L_img, 64]."""
    neutral = torch.ones_like(times)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        everything = velocity(teacher, batch, latents, times, neutral).float()
        nothing = velocity(teacher, empty_batch(len(latents)), latents, times, neutral).float()
    return everything - nothing


def guided_loss(student: Parts, teacher: Parts, clean: Tensor, batch: Batch, rng: np.random.Generator) -> Tensor:
    """Mean square error of the student's velocity against the guided one at random times and scales."""
    times = draw_times(len(clean), rng)
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    noisy = torch.lerp(clean, noise, times[:, None, None])
    guidance, wanted = torch.ones(len(clean)), noise - clean
    if rng.random() >= PLAIN_SHARE:
        guidance = torch.from_numpy(rng.uniform(1, 8, len(clean))).float()
        extra = STRENGTH * (guidance - 1)
        wanted = wanted + extra[:, None, None] * guidance_difference(teacher, batch, noisy, times)
    with torch.autocast("cpu", torch.bfloat16):
        answer = velocity(student, batch, noisy, times, guidance)
    return (answer.float() - wanted).square().mean()


def train(rank: int, options: argparse.Namespace) -> None:
    """One process of the training."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{options.meeting}", rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)
    start = torch.load(options.start / "average.pt")["parts"]
    teacher, student = Parts(), Parts()
    teacher.load_state_dict(start)
    student.load_state_dict(start)
    student.forget_guidance()
    teacher.eval().requires_grad_(False)
    optimizer = Muon(student.parameter_groups(), options.peak)
    run = Run(
        options.out, options.seconds, options.peak, {"parts": student}, optimizer, 200.0, writes=rank == 0, agree=first_seconds
    )
    rng = np.random.default_rng((options.seed, rank, run.step, 1))
    data = TrainingSet(options.data)
    total = 0.0
    for step in run.steps():
        loss = guided_loss(student, teacher, *data.draw(rng, options.batch), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(student)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 50 == 49:
            run.log(loss=total / 50)
            total = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the processes."""
    parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "batch", "ranks", "seed", seconds="1900", peak="1.5e-3")
    parser.add_argument("--start", type=Path, required=True, help="folder that training.transformer wrote")
    start_processes(train, parser.read(arguments))


if __name__ == "__main__":
    main()
