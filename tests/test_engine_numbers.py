"""Numbers and switches of numpy, where Python's are meant."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from uso_engine import Step, USOEngine

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}


def test_numpys_numbers_are_numbers(engine: USOEngine) -> None:
    """In every place that a number goes: what they do not do like Python's (wait, index, be a switch) would show late."""
    plain: dict[str, Any] = {
        "num_images": 2,
        "seed": 7,
        "guidance_scale": 4.0,
        "enable_safety_checker": True,
        "sync_mode": True,
    }
    numpys: dict[str, Any] = {
        "num_images": np.int8(2),
        "seed": np.float32(7),
        "guidance_scale": np.float16(4),
        "enable_safety_checker": np.True_,
        "sync_mode": np.bool_(True),
    }
    seen: list[tuple[int, int]] = []

    def look(step: Step) -> None:
        seen.append(engine.preview(step, np.float64(1)).size)  # type: ignore[arg-type]

    expected = engine.generate("a fish", **SMALL, **plain)
    result = engine.generate(
        "a fish",
        **SMALL,
        **numpys,
        timeout_s=np.float32(60),  # type: ignore[arg-type]
        priority=np.int64(3),  # type: ignore[arg-type]
        progress=np.False_,  # type: ignore[arg-type]
        on_step=look,
    )
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in expected.images]
    assert result.sync_mode is True
    assert seen == [(64, 64)]
    for seconds in (np.float32(1e9), np.float16(60), np.int64(60), 10**400):
        engine.generate("a fish", seed=1, **SMALL, timeout_s=seconds)  # type: ignore[arg-type]


def test_a_fraction_beyond_every_float_is_out_of_range(engine: USOEngine) -> None:
    with pytest.raises(ValueError, match="guidance_scale must be a number from 1 to 20, got Fraction"):
        engine.generate("a fish", guidance_scale=Fraction(10**400))


def test_a_budget_of_numpys(engine: USOEngine) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=np.float32(8)) as planned:  # type: ignore[arg-type]
        assert planned.memory_plan is not None
        assert planned.memory_plan.budget_bytes == 8 * 2**30
