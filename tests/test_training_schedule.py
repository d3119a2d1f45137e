"""A stage of training stops at its budget and goes on where it was interrupted."""

import math
from pathlib import Path

import torch
from torch import nn

from training.schedule import Run


def start(folder: Path) -> tuple[nn.Linear, Run]:
    """A stage of six seconds by a clock that a step moves on by one."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, Run(folder, 6, 0.1, {"model": model}, optimizer, agree=lambda seconds: math.floor(seconds) + 1.0)


def train(model: nn.Linear, run: Run, until: int) -> list[int]:
    taken = []
    for step in run.steps(save_every_s=0):
        run.optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        run.optimizer.step()
        taken.append(step)
        # The step that is interrupted here was not saved and is taken again.
        if step == until:
            break
    return taken


def test_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, run = start(tmp_path / "whole")
    assert train(whole, run, 99) == [0, 1, 2, 3, 4, 5]
    torch.manual_seed(0)
    first, run = start(tmp_path / "parts")
    assert train(first, run, 3) == [0, 1, 2, 3]
    second, run = start(tmp_path / "parts")
    assert (run.step, run.spent) == (3, 3.0)
    assert train(second, run, 99) == [3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    averages = (torch.load(tmp_path / name / "average.pt")["model"]["weight"] for name in ("whole", "parts"))
    assert torch.equal(*averages)
