"""Samplers' weights: their order on a flow with a known answer, and the sigmas that they refuse."""

import math
import re
from itertools import pairwise

import pytest
import torch

from uso_engine.sampling.multistep import Multistep
from uso_engine.sampling.sampler import SAMPLERS, SamplerName, _correction, _predictor
from uso_engine.sampling.schedule import schedule, shifted_schedule

REMEMBERING: tuple[SamplerName, ...] = ("ab2", "unipc")
MEAN, DEVIATION = 0.7, 0.4


def clean(x: float, sigma: float) -> float:
    """The expected clean value at a point of the flow from N(0, 1) to N(MEAN, DEVIATION^2)."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return MEAN + (1 - sigma) * DEVIATION**2 / variance * (x - (1 - sigma) * MEAN)


def carried(x: float, start: float, end: float) -> float:
    """Where that flow carries a point exactly: its place in units of the deviation stays."""
    deviations = [math.hypot((1 - sigma) * DEVIATION, sigma) for sigma in (start, end)]
    return (1 - end) * MEAN + deviations[1] / deviations[0] * (x - (1 - start) * MEAN)


def error(name: SamplerName, sigmas: list[float], x: float = 1.3) -> float:
    """How far a sampler's last value is from the exact one; the torch part takes the steps."""
    multistep = Multistep.begin(name, sigmas)
    latent = torch.full((1, 1), x, dtype=torch.float64)
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        velocity = (latent - clean(float(latent), sigma)) / sigma
        if multistep is None:
            latent = latent + (following - sigma) * velocity
        else:
            latent, multistep = multistep.advance(i, latent, velocity)
    return abs(float(latent) - carried(x, sigmas[0], sigmas[-1]))


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("unipc", 3)])
def test_order_on_a_flow_whose_answer_is_known(name: SamplerName, order: int, start: float, end: float) -> None:
    """Twice the steps divide the error by 2^order; UniPC's corrector makes it 3."""
    errors = [error(name, [start + (end - start) * i / n for i in range(n + 1)]) for n in (128, 256)]
    found = math.log2(errors[0] / errors[1])
    assert order - 0.1 < found < order + 0.1


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("shift", [1.0, 1.58, 3.0])
def test_on_the_engines_own_schedules_they_beat_euler(name: SamplerName, shift: float) -> None:
    """From sigma 1 to 0, where the ends are of first order: a fifth of Euler's error, and never more than Euler's."""
    euler, found = ([error(each, shifted_schedule(n, shift)) for n in (8, 16, 32, 64, 128)] for each in ("euler", name))
    ratios = [a / b for a, b in zip(found, euler, strict=True)]
    assert max(ratios) < 1
    assert max(ratios[2:]) < 0.2


def test_unequal_steps_keep_the_order() -> None:
    """Widths that alternate by a factor of 2: weights for equal steps would be of first order."""
    for name in REMEMBERING:
        errors = []
        for pairs in (64, 128):
            sigmas = [0.9]
            for _ in range(pairs):
                sigmas += [sigmas[-1] - 0.8 / pairs / 3, sigmas[-1] - 0.8 / pairs]
            errors.append(error(name, sigmas))
        assert math.log2(errors[0] / errors[1]) > 1.9, name


def test_unipcs_corrected_step_is_exact_for_parabolas() -> None:
    """Through three answers goes a parabola in the log-ratio l: next = kept * x + sigma_next * integral of exp(l) * it."""

    def clean_at(place: float) -> float:
        return 1.0 + 2.0 * place - 0.5 * place**2

    def integral(place: float) -> float:
        return math.exp(place) * (1.0 + 2.0 * place - 0.5 * place**2 - 2.0 + place - 1.0)

    sigmas = (0.9, 0.8, 0.55, 0.5, 0.2)
    places = [math.log((1 - sigma) / sigma) for sigma in sigmas]
    for i in (2, 3, 4):
        kept = sigmas[i] / sigmas[i - 1]
        predicted = zip(_predictor(sigmas)[i - 1].of_answers, places[i - 1 :: -1], strict=False)
        corrected = zip(_correction(sigmas, i), places[i::-1], strict=False)
        found = kept * 1.3 + sum(weight * clean_at(place) for weight, place in (*predicted, *corrected))
        exact = kept * 1.3 + sigmas[i] * (integral(places[i]) - integral(places[i - 1]))
        assert found == pytest.approx(exact, rel=1e-12)


def test_a_constant_velocity_is_followed_exactly() -> None:
    """Every step of every sampler carries a straight line where it leads."""
    for name, sampler in SAMPLERS.items():
        sigmas = schedule(9, 512, 512)
        x, answers = 3.0, list[float]()
        for (sigma, following), update in zip(pairwise(sigmas), sampler.updates(sigmas), strict=True):
            answers.insert(0, 2.0 if sampler.answer == "velocity" else x - sigma * 2.0)
            x = update.of_latent * x + sum(w * a for w, a in zip(update.of_answers, answers, strict=False))
            assert x == pytest.approx(3.0 + 2.0 * (following - 1), abs=1e-12), name


@pytest.mark.parametrize(
    ("name", "sigmas", "says"),
    [
        ("ab2", (1.0, 0.0), "sampler 'ab2' takes no step of second order in 1 steps from sigma 1 to 0"),
        ("unipc", (1.0, 0.5, 0.0), "sampler 'unipc' takes no step of second order in 2 steps"),
        ("ab2", (1.0, 0.95, 0.5, 0.0), "step 1, from 0.95 to 0.5, is 9.0 times as wide as the one before"),
        ("unipc", (0.9, 0.89, 0.5, 0.3), "sampler 'unipc' cannot take these sigmas: step 1, from 0.89 to 0.5, is"),
    ],
)
def test_sigmas_that_a_sampler_cannot_take(name: SamplerName, sigmas: tuple[float, ...], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        SAMPLERS[name].updates(sigmas)
    SAMPLERS["euler"].updates(sigmas)


@pytest.mark.parametrize("name", REMEMBERING)
def test_every_schedule_of_the_engine_is_taken(name: SamplerName) -> None:
    for steps in range(4, 51):
        shifted = [shifted_schedule(steps, shift, cosine) for shift in (1.0, 3.16) for cosine in (0.0, 0.25, 1.0)]
        for sigmas in (schedule(steps, 1024, 1024), *shifted):
            assert len(SAMPLERS[name].updates(sigmas)) == steps
