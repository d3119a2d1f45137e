"""Compare one thing with its reference, and hold the error against its bound."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from uso_engine.precision.tiers import TIERS, TierName
from uso_kernels.attention import BACKENDS

FLOAT32_BOUND = TIERS["float32"].velocity_bound
LOSSY_ATTENTION_BOUND = 0.015
"""What a lossy attention backend may add to the error of a tier: docs/quantization.md has the worst of drawn cases."""


@dataclass(frozen=True)
class Check:
    """One compared tensor or number.

    Args:
        case: which case.
        name: which tensor.
        error: relative error, or largest difference where the bound is absolute.
        bound: what it may be; None where a lossy tier makes no promise.
        note: what differs, where an error is not a number.
    """

    case: str
    name: str
    error: float
    bound: float | None
    note: str = ""

    @property
    def is_within(self) -> bool:
        """Whether the error is within its bound; a not-a-number never is."""
        return self.bound is None or self.error <= self.bound


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; infinite where the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    wide, truth = actual.double().cpu(), expected.double().cpu()
    norm = float(truth.norm())
    difference = float((wide - truth).norm())
    return difference / norm if norm > 0 else difference


def bound_for(name: str, tier: TierName, last_step: int, attention: str = "auto") -> float | None:
    """What a tensor's error may be.

    Args:
        name: of the tensor; ``latents.i`` is the latent after step i.
        tier: what the engine computes in.
        last_step: index of the last step.
        attention: the backend that was asked for; a lossy one adds `LOSSY_ATTENTION_BOUND`.
    """
    row = TIERS[tier]
    is_lossy = attention in BACKENDS and BACKENDS[attention].loss > 0
    is_computed_before = name in ("noise", "timesteps") or name.startswith(("img_ids", "ref_ids"))
    if is_computed_before or (row.is_exact and (not is_lossy or name.startswith("style_tokens"))):
        return FLOAT32_BOUND
    more = LOSSY_ATTENTION_BOUND if is_lossy else 0.0
    if name == "velocity.0":
        return row.velocity_bound + more
    return row.latent_bound + more if name in (f"latents.{last_step}", "unpacked") else None
