"""Sigmas of the denoising steps.

The schedule is FLUX's: evenly spaced times, shifted towards noise by an amount that grows with the image. USO's authors compute
the shift from ``(w // 8) * (h // 8) // 256`` instead of the true token count, so it is far gentler than FLUX's usual one; the
released weights are used with it, so it stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def schedule(steps: int, width: int, height: int) -> list[float]:
    """Sigmas from 1 to 0.

    Args:
        steps: number of denoising steps, at least 1.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        steps + 1 numbers, the first 1 and the last 0; float32 values.

    Raises:
        ValueError: fewer than one step.

    Source: FLUX.1's ``get_schedule`` with base shift 0.5 at 256 and maximal shift 1.15 at 4096.
    """
    counted_tokens = (width // 8) * (height // 8) // 256
    slope = (1.15 - 0.5) / (4096 - 256)
    return shifted_schedule(steps, math.exp(slope * counted_tokens + (0.5 - slope * 256)))


def shifted_schedule(steps: int, shift: float, cosine: float = 0.0) -> list[float]:
    """Sigmas from 1 to 0 with a shift of one's own.

    Args:
        steps: number of denoising steps, at least 1.
        shift: over 0; 1 is evenly spaced, more stays longer at high sigmas.
        cosine: from 0 to 1, the share of cosine spacing in the times that are shifted: steps become shorter at both ends.

    Returns:
        steps + 1 numbers, the first 1 and the last 0; float32 values.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    times = _evenly_spaced(steps)
    if cosine:
        blended = [(1 - cosine) * t + cosine * (1 - math.cos(math.pi * t)) / 2 for t in times.tolist()]
        times = torch.tensor(blended, dtype=torch.float64).to(torch.float32)
    shifted: list[float] = (shift / (shift + (1 / times - 1))).tolist()
    return shifted


def _evenly_spaced(steps: int) -> Tensor:
    """What ``torch.linspace(1, 0, steps + 1)`` gives in float32 on every CPU with fused multiply-add, on any CPU.

    Its values are counted from the nearer end in steps of a float32 width, each rounded once. Without fused multiply-add (on a
    CPU, or under ``ATEN_CPU_CAPABILITY=default``) torch rounds twice, and 31 of the 50 schedules come out otherwise.
    """
    width = float(torch.tensor(-1 / steps, dtype=torch.float64).to(torch.float32))
    half = (steps + 1) // 2
    times = [1 + width * i if i < half else -width * (steps - i) for i in range(steps + 1)]
    return torch.tensor(times, dtype=torch.float64).to(torch.float32)


def check_sigmas(sigmas: Sequence[float]) -> list[float]:
    """Check a custom list of sigmas.

    Args:
        sigmas: at least two numbers, strictly falling, between 1 and 0.

    Returns:
        The same numbers as a list of floats.

    Raises:
        ValueError: too few, not falling, or out of range.
    """
    values = [float(s) for s in sigmas]
    if len(values) < 2:
        raise ValueError(f"sigmas must hold at least 2 numbers (one step), got {len(values)}")
    if not all(0.0 <= s <= 1.0 for s in values):
        raise ValueError(f"sigmas must lie between 0 and 1, got {values}")
    for i, (before, after) in enumerate(pairwise(values)):
        if after >= before:
            raise ValueError(f"sigmas must fall strictly, got {before} then {after} at positions {i} and {i + 1}")
    return values
