"""Capturing without a GPU: a captured computation is repeated by calling it again.

It finds its inputs in the graph's own tensors and leaves its result in one, as a CUDA graph does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uso_engine.sampling.step_graphs import MIB


class Repeated:
    """A captured computation that is called again."""

    def __init__(self, compute: Callable[[], Tensor], velocity: Tensor, size_bytes: int, error: float) -> None:
        self._compute, self._velocity, self.size_bytes, self._error = compute, velocity, size_bytes, error
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        self._velocity.copy_(self._compute() + self._error)


class Repeating:
    """Captures by remembering; what it records is computed only when it is replayed."""

    def __init__(self, size_bytes: int = MIB) -> None:
        self.size_bytes, self.error = size_bytes, 0.0
        self.faults: list[Exception] = []
        self.captured: list[Repeated] = []

    def missing(self, device: torch.device) -> str | None:
        return None

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Repeated, Tensor]:
        if self.faults:
            raise self.faults.pop(0)
        velocity = torch.full_like(compute(), float("nan"))
        self.captured.append(Repeated(compute, velocity, self.size_bytes, self.error))
        return self.captured[-1], velocity
