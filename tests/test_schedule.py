"""Sigmas of the steps: the authors' values and the checks on one's own."""

import math
from itertools import pairwise

import pytest

from uso_engine.sampling.schedule import check_sigmas, schedule, shifted_schedule

# Facts about the authors' code: first inner sigma of "steps@width x height".
FIRST_INNER = {(28, 1024, 1024): 0.9773201942443848, (28, 512, 512): 0.9771393537521362, (50, 768, 1024): 0.9873406291007996}


@pytest.mark.parametrize(("case", "expected"), FIRST_INNER.items())
def test_schedule_has_the_authors_values(case: tuple[int, int, int], expected: float) -> None:
    sigmas = schedule(*case)
    assert sigmas[1] == pytest.approx(expected, rel=1e-7)
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, case[0] + 1)
    assert sigmas == sorted(sigmas, reverse=True)


def test_shift_counts_tokens_as_the_authors_do() -> None:
    # 1024 x 1024 counts as 64 tokens, far left of the line through (256, 0.5) and (4096, 1.15).
    mu = 0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256)
    t = 1 - 1 / 28
    assert schedule(28, 1024, 1024)[1] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1), rel=1e-6)


def test_a_shift_of_ones_own_and_steps_shorter_at_both_ends() -> None:
    assert shifted_schedule(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted_schedule(2, 3.0) == [1.0, 0.75, 0.0]
    cosine = shifted_schedule(4, 1.0, 1.0)
    assert cosine == pytest.approx([1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0], rel=1e-6)
    for steps in (1, 7, 50):
        blended = shifted_schedule(steps, 1.58, 0.25)
        assert (blended[0], blended[-1], len(blended)) == (1.0, 0.0, steps + 1)
        assert all(after < before for before, after in pairwise(blended))
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        shifted_schedule(0, 1.0)


def test_one_step_goes_from_noise_to_image() -> None:
    assert schedule(1, 16, 16) == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        schedule(0, 512, 512)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least 2 numbers"),
        ([1.0, 0.5, 0.5, 0.0], "fall strictly, got 0.5 then 0.5 at positions 1 and 2"),
        ([0.0, 1.0], "fall strictly"),
        ([1.5, 0.0], "between 0 and 1"),
        ([1.0, float("nan")], "between 0 and 1"),
    ],
)
def test_custom_sigmas_are_checked(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sigmas(sigmas)
    assert check_sigmas([0.6, 0.3, 0]) == [0.6, 0.3, 0.0]
