"""Sigmas of the steps: the authors' values and the checks on one's own."""

import math

import pytest

from uso_engine.sampling.schedule import check_sigmas, schedule

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
