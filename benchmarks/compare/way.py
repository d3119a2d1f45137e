"""A way to answer a request, and the list of those that can be run here."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.measure import Clock, time_once

from .cases import Case
from .evaluations import Evaluations


class Way(Protocol):
    """One way: the engine in a tier, or a peer.

    Its `name` is what records call it; `settings` are plain JSON; `evaluations` stand around its transformer's evaluations;
    `weights` are the bytes of the transformer that it needs; `largest_difference` is how far its first velocity may lie from
    the first way's, relative.
    """

    name: str
    settings: dict[str, object]
    evaluations: Evaluations
    weights: int
    largest_difference: float

    def request(self, case: Case, seed: int) -> list[bytes]:
        """The case's pictures as PNG files, everything from prompt and pictures on computed now."""
        ...

    def velocity(self, output: Tensor, case: Case) -> Tensor:
        """The first picture's velocity [L_img, 64] of what an evaluation gave."""
        ...

    def close(self) -> None:
        """Let go of what it has for itself."""
        ...


class Requested(NamedTuple):
    """One request's milliseconds, and those of its transformer's evaluations."""

    request_ms: float
    evaluations_ms: list[float]


def time_request(way: Way, case: Case, seed: int, clock: Clock) -> Requested:
    """Make and time one request."""
    way.evaluations.reset()
    # A request ends with bytes on the host: a clock sees all of it on a GPU too.
    request_ms = time_once(lambda: way.request(case, seed), torch.device("cpu"), clock)
    return Requested(request_ms, way.evaluations.milliseconds())
