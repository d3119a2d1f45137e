"""The product into memory of the caller's has the bits of the one that returns a new tensor."""

import pytest
import torch
from recorded_shapes import Shapes
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.linear import linear
from uso_kernels.ragged import Ragged

# Rows of a tile, of some and of many; widths of the small test model, and one that is no power of two.
SHAPES = [(16, 128, 384), (48, 640, 128), (272, 128, 896), (64, 1024, 64), (80, 192, 48)]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.25).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_bits_are_those_of_a_new_tensor(rows: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, weight = drawn(rows, k, dtype=dtype, seed=1), drawn(n, k, dtype=dtype, seed=2)
    strided = torch.empty(rows, k + 16, dtype=dtype)[:, :k].copy_(x)
    for bias in (None, drawn(n, dtype=dtype, seed=3)):
        for columns in (slice(None), slice(0, n // 2), slice(n // 2, None)):
            part, added = weight[columns], None if bias is None else bias[columns]
            expected = F.linear(x, part, added)
            out = torch.full_like(expected, float("nan"))
            assert linear(x, part, added, out=out) is out
            assert torch.equal(out, expected)
            assert torch.equal(linear(strided, part, added, out=out.fill_(float("nan"))), F.linear(strided, part, added))
            assert torch.equal(linear(x, part, added), expected)


@pytest.mark.parametrize("bias", [None, drawn(96, dtype=torch.float32, seed=3)], ids=["plain", "bias"])
def test_each_sequence_is_a_product_of_its_own(bias: Tensor | None) -> None:
    """The rows that a library is handed at once are those of one sequence, padding included, and nothing is left out."""
    layout = Ragged.pack([17, 1, 64, 33], capacities=[32, 32, 64, 48])
    x, weight = drawn(layout.rows, 64, dtype=torch.float32, seed=1), drawn(96, 64, dtype=torch.float32, seed=2)
    expected = torch.cat([F.linear(x[rows], weight, bias) for rows in layout.row_slices])
    out = torch.full_like(expected, float("nan"))
    for given in (None, out):
        with Shapes() as made:
            result = linear(x, weight, bias, sequences=layout, out=given)
        assert torch.equal(result, expected)
        assert sorted(shapes[-2][0] for shapes in made.matrix_products()) == [32, 32, 48, 64]
    with Shapes() as made:
        linear(x[:32], weight, bias, sequences=Ragged.pack([20]))
    assert len(made.matrix_products()) == 1


def test_sequences_that_do_not_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="the sequences have 48 rows, x has 64"):
        linear(torch.zeros(64, 8), torch.zeros(8, 8), sequences=Ragged.pack([16, 32]))
    with pytest.raises(ValueError, match="x must be a matrix"):
        linear(torch.zeros(2, 24, 8), torch.zeros(8, 8), sequences=Ragged.pack([16, 32]))


def test_gradients_need_a_tensor_of_their_own() -> None:
    x, weight = drawn(16, 32, dtype=torch.float32, seed=1), drawn(8, 32, dtype=torch.float32, seed=2).requires_grad_()
    out = torch.zeros(16, 8)
    linear(x, weight, out=out).sum().backward()
    assert not out.any()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.sum(0).expand(8, -1), rtol=1e-5)
    with torch.no_grad():
        assert linear(x, weight, out=out).data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    "out", [torch.zeros(16, 9), torch.zeros(16, 8).double(), torch.zeros(8, 16).t(), torch.zeros(16, 8, device="meta")]
)
def test_memory_that_does_not_fit(out: Tensor) -> None:
    with pytest.raises(ValueError, match="out must"):
        linear(torch.zeros(16, 32), torch.zeros(8, 32), out=out)


def test_more_than_two_dimensions_have_no_memory_to_go_to() -> None:
    with pytest.raises(ValueError, match="x must be a matrix"):
        linear(torch.zeros(2, 8, 32), torch.zeros(8, 32), out=torch.zeros(16, 8))
