"""Position ids and rotary tables."""

import math

import pytest
import torch

from uso_engine.model.rope import content_positions, grid_positions, rope_tables


def test_grid_counts_rows_then_columns() -> None:
    assert grid_positions((2, 3)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize(("mode", "second"), [("d", (6, 8)), ("h", (6, 0)), ("w", (0, 8)), ("o", (0, 0))])
def test_contents_are_offset_by_the_target_and_each_other(mode: str, second: tuple[int, int]) -> None:
    ids = content_positions((4, 5), [(2, 3), (1, 2)], mode)  # type: ignore[arg-type]
    assert ids[1].tolist() == [[0, *second], [0, second[0], second[1] + 1]]


def test_further_axes_are_zero() -> None:
    assert grid_positions((1, 2), (3, 4), axes=4).tolist() == [[0, 3, 4, 0], [0, 3, 5, 0]]
    assert content_positions((4, 5), [(1, 1)], axes=5)[0].tolist() == [[0, 4, 5, 0, 0]]


def test_unknown_offset_is_refused() -> None:
    with pytest.raises(ValueError, match="'d', 'h', 'w', 'o', got 'x'"):
        content_positions((4, 5), [(2, 3)], "x")  # type: ignore[arg-type]


def test_tables_turn_each_axis_by_its_own_columns() -> None:
    cos, sin = rope_tables(torch.tensor([[0.0, 3.0, 700.0]]), (4, 6, 6), 10_000)
    assert cos.shape == (1, 8)
    angles = [0.0, 0.0, *(3 * 10_000 ** (-2 * i / 6) for i in range(3)), *(700 * 10_000 ** (-2 * i / 6) for i in range(3))]
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-7)
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-7)
    assert cos.dtype == sin.dtype == torch.float32
