"""Samplers of the flow as data: each step is a weighted sum of the latent and of what the model answered at the last steps.

    next = of_latent * latent + sum of of_answers[i] * answer i steps ago

An answer is the velocity v (ab2) or the clean latent that it points to, x - sigma * v (unipc). The weights depend on the
sigmas alone, so they are computed once, in float64, and a step of any sampler costs one evaluation of the model.

    euler       x + h v, h = sigma_next - sigma
    ab2         Adams-Bashforth of order 2: v extrapolated through the last two to the middle of the step
    unipc       UniPC of order 2 with B2(h) = exp(h) - 1: the clean latent extrapolated in log((1 - sigma) / sigma), which is
                DPM-Solver++(2M)'s step in flow form, and each answer also corrects the step that led to it

The log-ratio is infinite at sigma 1 and 0: steps that would need it there are of first order, which are Euler's.

Needs no torch. Sources: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5, for steps of unequal
width; Lu et al. 2022 (DPM-Solver++); Zhao et al. 2023 (UniPC).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

SamplerName = Literal["euler", "ab2", "unipc"]
"""The samplers; euler is the authors'."""

Answer = Literal["velocity", "clean"]

WIDEST_RATIO = 4.0
"""How many times as wide as the last a step may be: beyond, more than twice the last difference would be added to an answer."""


LARGEST_SHIFT = 100.0
"""Of a schedule: sigma = shift / (shift + 1 / t - 1); with more, no step but the last is far from noise."""


@dataclass(frozen=True)
class Update:
    """The weights of one step.

    Args:
        of_latent: of the running latent.
        of_answers: of the model's answers, the newest first.
        order: of the step.
    """

    of_latent: float
    of_answers: tuple[float, ...]
    order: int


@dataclass(frozen=True)
class Sampler:
    """One way from noise to a latent.

    Args:
        name: what requests call it.
        answer: what its weights are for.
        weights: the steps, of the sigmas.
    """

    name: SamplerName
    answer: Answer
    weights: Callable[[Sequence[float]], list[Update]]

    def updates(self, sigmas: Sequence[float]) -> tuple[Update, ...]:
        """The weights of every step.

        Args:
            sigmas: steps + 1 strictly falling numbers between 1 and 0.

        Raises:
            ValueError: too few steps for one of second order, or one that is far wider than the one before.
        """
        found = tuple(self.weights(sigmas))
        if self.name == "euler":
            return found
        if all(update.order < 2 for update in found):
            raise ValueError(
                f"sampler {self.name!r} takes no step of second order in {len(found)} steps from sigma {sigmas[0]:g} to "
                f"{sigmas[-1]:g}; ask for more steps or for sampler 'euler'"
            )
        position = _log_ratio if self.answer == "clean" else _sigma
        widths = [abs(position(after) - position(before)) for before, after in pairwise(sigmas)]
        for i, (before, width) in enumerate(pairwise(widths), start=1):
            if math.isfinite(width) and width > WIDEST_RATIO * before:
                raise ValueError(
                    f"sampler {self.name!r} cannot take these sigmas: step {i}, from {sigmas[i]:g} to {sigmas[i + 1]:g}, is "
                    f"{width / before:.1f} times as wide as the one before, at most {WIDEST_RATIO:g} times is extrapolated; "
                    "give sigmas that fall more evenly, or ask for sampler 'euler'"
                )
        return found


def _sigma(sigma: float) -> float:
    return sigma


def _log_ratio(sigma: float) -> float:
    """log((1 - sigma) / sigma), rising as sigma falls; infinite at both ends."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log((1 - sigma) / sigma)


def _euler(sigmas: Sequence[float]) -> list[Update]:
    return [Update(1.0, (after - before,), 1) for before, after in pairwise(sigmas)]


def _ab2(sigmas: Sequence[float]) -> list[Update]:
    widths = [after - before for before, after in pairwise(sigmas)]
    first = Update(1.0, (widths[0],), 1)
    return [first, *(Update(1.0, (h * (1 + h / (2 * last)), -h * h / (2 * last)), 2) for last, h in pairwise(widths))]


def _predictor(sigmas: Sequence[float]) -> list[Update]:
    """UniPC's steps without its corrector: DPM-Solver++(2M)'s, of the clean latents that the answers point to."""
    found = []
    for i in range(len(sigmas) - 1):
        back = _extrapolation(sigmas, i)
        kept = sigmas[i + 1] / sigmas[i]
        if back is None:
            found.append(Update(kept, (1 - kept,), 1))
        else:
            found.append(Update(kept, ((1 - kept) * (1 + back), (kept - 1) * back), 2))
    return found


def _extrapolation(sigmas: Sequence[float], i: int) -> float | None:
    """Half of step i's width over the last one's in log-ratio: the share of the last difference to add; None: first order."""
    if i == 0 or i + 1 >= len(sigmas):
        return None
    last, here, following = (_log_ratio(sigma) for sigma in sigmas[i - 1 : i + 2])
    return (following - here) / (2 * (here - last)) if math.isfinite(last) and math.isfinite(following) else None


def _unipc(sigmas: Sequence[float]) -> list[Update]:
    """The predictor's steps, each from the latent as the newest answer corrects it: that is a sum of answers alone."""
    found = []
    for i, plain in enumerate(_predictor(sigmas)):
        answers = [*plain.of_answers, 0.0, 0.0][:3]
        corrected = _correction(sigmas, i)
        for j, weight in enumerate(corrected):
            answers[j] += plain.of_latent * weight
        # At sigma 0 nothing is left of the latent, nor of what corrects it.
        order = 2 if corrected and plain.of_latent > 0 else plain.order
        found.append(Update(plain.of_latent, tuple(answers), order))
    return found


def _correction(sigmas: Sequence[float], i: int) -> tuple[float, ...]:
    """What the answers at steps i, i - 1 and i - 2 add to the latent at step i; nothing before the first step is taken.

    The corrector is the predictor's formula with one more point, the new answer. With h the width of the step that led here, in
    log-ratio, and r < 0 the place of the answer before it in units of h, its weights solve
        a + b = (1 - (1 - exp(-h)) / h) / (1 - exp(-h)),   r a + b = (1 - 2 / h + 2 (1 - exp(-h)) / h^2) / (1 - exp(-h))
    """
    if i == 0:
        return ()
    last, here = _log_ratio(sigmas[i - 1]), _log_ratio(sigmas[i])
    added = 1 - sigmas[i] / sigmas[i - 1]
    back = _extrapolation(sigmas, i - 1)
    if back is None:
        return added / 2, -added / 2
    h = here - last
    r = -1 / (2 * back)
    share = -math.expm1(-h)
    first = (1 - share / h) / share
    second = (1 - 2 / h + 2 * share / h**2) / share
    older = (first - second) / (1 - r)
    newest = first - older
    slope = older / r - (-back)
    return added * newest, -added * (newest + slope), added * slope


SAMPLERS: dict[SamplerName, Sampler] = {
    "euler": Sampler("euler", "velocity", _euler),
    "ab2": Sampler("ab2", "velocity", _ab2),
    "unipc": Sampler("unipc", "clean", _unipc),
}
