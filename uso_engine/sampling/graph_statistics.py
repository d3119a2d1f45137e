"""Counts of an engine's CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GraphStatistics:
    """What became of an engine's steps by ``cuda_graphs``.

    Args:
        mode: "auto", "on" or "off".
        reason: why no step is captured here; None where some may be.
        kept: CUDA graphs.
        held_bytes: device memory of all of them.
        captured: graphs that were made.
        replayed: steps that a graph computed.
        eager: steps computed without one: the first of their kind, those that keep the GPU busier than the host, and all where
            there is a reason or a failure.
        evicted: graphs that were let go for others, or because memory ran out.
        failures: why steps of a kind could not be captured, one sentence for each kind.
    """

    mode: str
    reason: str | None
    kept: int = 0
    held_bytes: int = 0
    captured: int = 0
    replayed: int = 0
    eager: int = 0
    evicted: int = 0
    failures: tuple[str, ...] = ()
