"""Trains the evaluation's classifiers on drawings, blurred, shifted in colour and made noisy, never on generated pictures.

python -m training.classifiers --data DIR --out DIR --seconds 420 --weights FILE
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.arguments import TrainingParser
from training.autoencoder import to_pixels
from training.muon import Muon
from training.samples import HELD_OUT, read_samples
from training.schedule import Run
from uso_engine.evaluation.classifiers import Classifiers


def worsen(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurs a random share of pictures [n, 3, h, w], shifts brightness and adds noise of up to 8 %."""
    n = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.from_numpy(rng.random((n, 1, 1, 1)) * (rng.random((n, 1, 1, 1)) < 0.5)).float()
    noise = torch.from_numpy(rng.random((n, 1, 1, 1)) * 0.16).float() * torch.randn_like(pixels)
    shift = torch.from_numpy(rng.normal(0, 0.05, (n, 3, 1, 1))).float()
    return (torch.lerp(pixels, blurred, mix) + noise + shift).clamp(-1, 1)


def measure(model: Classifiers, pixels: Tensor, labels: Tensor) -> list[float]:
    """Share of right answers for kind, place and style."""
    with torch.no_grad():
        answers = [torch.cat(parts) for parts in zip(*(model(chunk) for chunk in pixels.split(64)), strict=True)]
    return [float((answer.argmax(1) == labels[:, i]).float().mean()) for i, answer in enumerate(answers)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on the targets of the set."""
    parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "seed", seconds="420", peak="2e-3")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the classifiers")
    options = parser.read(arguments)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    samples = read_samples(options.data)
    pictures, labels = samples.pictures["target"], torch.from_numpy(samples.labels)
    model = Classifiers()
    stages = list(model.stages.parameters())
    heads = list(model.heads.parameters())
    optimizer = Muon([{"params": stages[2:]}, {"params": [*stages[:2], *heads], "adam": True}], options.peak)
    run = Run(options.out, options.seconds, options.peak, {"classifiers": model}, optimizer, decay=100)
    for step in run.steps():
        rows = np.sort(rng.integers(0, len(pictures) - HELD_OUT, 32))
        pixels = worsen(to_pixels(pictures[rows]), rng)
        with torch.autocast("cpu", torch.bfloat16):
            answers = model(pixels)
        loss = sum((F.cross_entropy(answers[i].float(), labels[rows, i]) for i in range(3)), start=torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            run.log(loss=loss.item())
    model.load_state_dict(run.average["classifiers"])
    kind, place, style = measure(model.eval(), to_pixels(pictures[-HELD_OUT:]), labels[-HELD_OUT:])
    run.log(kind=kind, place=place, style=style)
    save_file({key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}, options.weights)


if __name__ == "__main__":
    main()
