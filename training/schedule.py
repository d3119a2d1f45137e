"""What every training stage shares: a wall-clock budget, a learning rate that follows it, a log and checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn


class Run:
    """One resumable stage of training.

    A stage ends after a number of seconds of its own work, so the learning rate follows the share of that time which is
    spent; a resumed stage goes on where its last checkpoint was written.

    Args:
        folder: receives ``log.jsonl`` and ``state.pt``.
        seconds: budget of wall-clock time.
        peak: highest learning rate.
        parts: what is saved besides the optimiser: modules by name.
        optimizer: its learning rate is set before every step.
        decay: mean lifetime in steps of the running average of the parameters.
        writes: keep the running average, the log and the checkpoints; one of several processes does.
        agree: turns this process's seconds into those that all processes go by.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        peak: float,
        parts: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        decay: float = 300.0,
        writes: bool = True,
        agree: Callable[[float], float] = float,
    ) -> None:
        self.folder, self.seconds, self.peak, self.parts, self.optimizer, self.decay = (
            folder,
            seconds,
            peak,
            parts,
            optimizer,
            decay,
        )
        self.writes, self.agree = writes, agree
        self.step, self.spent = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._resume()
        self.average = {
            name: {key: value.detach().clone().float() for key, value in part.state_dict().items()}
            for name, part in parts.items()
        }
        if (folder / "average.pt").exists():
            self.average = torch.load(folder / "average.pt")

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0..1."""
        return min(1.0, self.spent / self.seconds)

    def steps(self, save_every_s: float = 60.0) -> Iterator[int]:
        """Counts steps until the budget is spent, sets the learning rate and saves between steps."""
        last_save = last = time.monotonic()
        while self.spent < self.seconds:
            rate = self.peak * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * float(group.get("factor", 1.0))
            yield self.step
            if self.writes:
                self._follow()
            self.step += 1
            now = time.monotonic()
            self.spent, last = self.agree(self.spent + now - last), now
            if self.writes and now - last_save > save_every_s:
                self.save()
                last_save = time.monotonic()
        if self.writes:
            self.save()

    def log(self, **values: float) -> None:
        """Appends one line to the curve."""
        if not self.writes:
            return
        line = {"step": self.step, "seconds": round(self.spent, 1), **{key: round(value, 6) for key, value in values.items()}}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def _follow(self) -> None:
        keep = min(1 - 1 / self.decay, (1 + self.step) / (10 + self.step))
        for name, part in self.parts.items():
            for key, value in part.state_dict().items():
                self.average[name][key].lerp_(value.float(), 1 - keep)

    def save(self) -> None:
        """Writes the state, the running average in a file of its own."""
        state: dict[str, object] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "spent": self.spent}
        for name, what in (("state.pt", state), ("average.pt", self.average)):
            torch.save(what, self.folder / f"{name}.partial")
            (self.folder / f"{name}.partial").rename(self.folder / name)

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]
