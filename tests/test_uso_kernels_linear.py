"""A product of a packed batch is one product per sequence, with the bits of each sequence alone."""

from collections.abc import Callable

import pytest
import torch
from recorded_shapes import Shapes
from torch import Tensor
from torch.nn import functional as F

from uso_kernels import cpu
from uso_kernels.matmul.linear import linear, linear_of_parts
from uso_kernels.matmul.product import Product
from uso_kernels.ragged import Ragged

# Rows of a tile, of some and of many; widths of the small test model, and one that is no power of two.
SHAPES = [(16, 128, 384), (48, 640, 128), (272, 128, 896), (64, 1024, 64), (80, 192, 48)]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.25).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_bits_are_those_of_torchs_own_product(
    rows: int, k: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, strided, in parts of the columns, and beside a second sequence."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: True)
    x, weight = drawn(rows, k, dtype=dtype, seed=1), drawn(n, k, dtype=dtype, seed=2)
    strided = torch.empty(rows, k + 16, dtype=dtype)[:, :k].copy_(x)
    pair, layout = torch.cat((x, x)), Ragged.pack([rows, rows])
    for bias in (None, drawn(n, dtype=dtype, seed=3)):
        for columns in (slice(None), slice(0, n // 2), slice(n // 2, None)):
            part, added = weight[columns], None if bias is None else bias[columns]
            expected = F.linear(x, part, added)
            assert torch.equal(linear(x, part, added), expected)
            assert torch.equal(linear(strided, part, added), F.linear(strided, part, added))
            assert torch.equal(linear(pair, part, added, layout), torch.cat((expected, expected)))


@pytest.mark.parametrize("rows", [1, 16, 700], ids=str)
def test_widened_products_round_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU has no bfloat16 products, the result is the exact one rounded: in chunks, strided, in parts, in company."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: False)
    x, weight = drawn(rows, 144, dtype=torch.bfloat16, seed=1)[:, :128], drawn(96, 128, dtype=torch.bfloat16, seed=2)
    for bias in (None, drawn(96, dtype=torch.bfloat16, seed=3)):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        result = linear(x, weight, bias)
        # Half a unit in the last of 8 bits, and what float32 sums are off by.
        assert float(((result.double() - exact).abs() / exact.abs().clamp(min=1)).max()) < 2**-8 + 1e-5
        assert torch.equal(linear(x[None], weight, bias), result[None])
        part = linear(x, weight[32:], None if bias is None else bias[32:])
        assert float((part.double() - result[:, 32:].double()).abs().max()) <= 2**-7 * float(exact.abs().max())
        layout = Ragged.pack([32, rows, 16])
        company = drawn(layout.rows, 128, dtype=torch.bfloat16, seed=4)
        company[layout.span(1)] = x
        company[layout.span(1).stop : layout.end(1)] = 0
        alone = linear(company[layout.row_slices[1]], weight, bias)
        assert torch.equal(linear(company, weight, bias, layout)[layout.row_slices[1]], alone)
    assert linear(x[:0], weight).shape == (0, 96)


@pytest.mark.parametrize("bias", [None, drawn(96, dtype=torch.float32, seed=3)], ids=["plain", "bias"])
def test_each_sequence_is_a_product_of_its_own(bias: Tensor | None) -> None:
    """The rows that a library is handed at once are those of one sequence, padding included, and nothing is left out."""
    layout = Ragged.pack([17, 1, 64, 33], capacities=[32, 32, 64, 48])
    x, weight = drawn(layout.rows, 64, dtype=torch.float32, seed=1), drawn(96, 64, dtype=torch.float32, seed=2)
    expected = torch.cat([F.linear(x[rows], weight, bias) for rows in layout.row_slices])
    with Shapes() as made:
        result = linear(x, weight, bias, layout)
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


def test_gradients_flow_through_packed_products() -> None:
    x, weight = drawn(32, 32, dtype=torch.float32, seed=1), drawn(8, 32, dtype=torch.float32, seed=2).requires_grad_()
    linear(x, weight, sequences=Ragged.pack([16, 16])).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.sum(0).expand(8, -1), rtol=1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_in_the_product_and_products_of_parts(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against float64, at most twice as far off as PyTorch's own operations in turn, with the same bits in company."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: native)
    layout = Ragged.pack([33, 16, 100])
    x, weight, bias = (drawn(*shape, dtype=dtype, seed=i) / 8 for i, shape in enumerate(((layout.rows, 640), (96, 640), (96,))))
    parts, place = (x[:, :128], x[:, 128:]), drawn(layout.rows, 144, dtype=dtype, seed=9)[:, :96]
    exact = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x, weight, bias)
    for result, expected, eager in (
        (linear(x, weight, bias, layout, gelu=True), F.gelu(exact, approximate="tanh"), F.gelu(plain, approximate="tanh")),
        (linear_of_parts(parts, weight, bias, layout), exact, plain),
        (linear(x, weight, bias, layout, out=place), exact, plain),
    ):
        assert float((result.double() - expected).norm()) <= 2 * float((eager.double() - expected).norm())
    assert torch.equal(linear(x, weight, bias, layout), place)
    for rows in layout.row_slices:
        alone = tuple(part[rows] for part in parts)
        assert torch.equal(linear_of_parts(alone, weight, bias), linear_of_parts(parts, weight, bias, layout)[rows])
        assert torch.equal(linear(x[rows], weight, bias, gelu=True), linear(x, weight, bias, layout, gelu=True)[rows])
    with pytest.raises(ValueError, match="the parts have 600 columns together, the weight has 640"):
        linear_of_parts((x[:, :88], x[:, 128:]), weight, bias, layout)
    with pytest.raises(ValueError, match="out must be"):
        linear(x, weight, bias, layout, out=x)


@pytest.mark.parametrize("fused", [True, False])
def test_a_cpu_that_cannot_end_a_product_in_gelu_activates_afterwards(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared and not, alone and in company, the same bits; sums not rounded before are nearer to the truth."""
    if fused and not cpu.activates(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no bfloat16 product that ends in GELU")
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "_has_product_with_gelu", lambda: fused)
    layout = Ragged.pack([64, 48])
    shapes = ((112, 256), (96, 256), (96,))
    x, weight, bias = (drawn(*shape, dtype=torch.bfloat16, seed=i) / 4 for i, shape in enumerate(shapes))
    together = linear(x, weight, bias, layout, gelu=True)
    with torch.no_grad():
        for rows, length in zip(layout.row_slices, layout.lengths, strict=True):
            alone = Product(weight, bias, Ragged.pack([length])).activated(x[rows])
            assert torch.equal(alone, together[rows])
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    eager = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    errors = [float((result.double() - exact).norm()) for result in (together, eager)]
    assert errors[0] < 0.8 * errors[1] if fused else errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("spread", [lambda bias: torch.stack((bias, -bias), 1)[:, 0], lambda bias: bias[:1].expand(len(bias))])
def test_a_bias_with_a_stride_of_its_own(spread: Callable[[Tensor], Tensor]) -> None:
    x, weight, bias = (drawn(*shape, dtype=torch.bfloat16, seed=i) / 4 for i, shape in enumerate(((48, 64), (96, 64), (96,))))
    strided = spread(bias)
    activated = linear(x, weight, strided, gelu=True)
    exact = F.gelu(F.linear(x.double(), weight.double(), strided.double()), approximate="tanh")
    assert float((activated.double() - exact).norm() / exact.norm()) < 1e-2
    assert torch.equal(activated, linear(x, weight, strided.contiguous(), gelu=True))


def test_a_compiler_joins_product_and_gelu_by_itself() -> None:
    """oneDNN's own operation cannot be compiled with a weight that may change."""
    x, weight, bias = (drawn(*shape, dtype=torch.bfloat16, seed=i) / 4 for i, shape in enumerate(((48, 64), (96, 64), (96,))))
    seen: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with torch.no_grad():
        compiled = torch.compile(lambda x: linear(x, weight, bias, gelu=True), backend=keep)(x)
    assert seen and not any("mkldnn" in name for name in seen)
    assert torch.allclose(compiled.float(), linear(x, weight, bias, gelu=True).float(), rtol=1e-2, atol=1e-3)


def test_gradients_flow_through_parts_gelu_and_a_place() -> None:
    x, weight = drawn(32, 32, dtype=torch.float32, seed=1), drawn(8, 32, dtype=torch.float32, seed=2).requires_grad_()
    place = torch.empty(32, 8)
    sums = (linear_of_parts((x[:, :16], x[:, 16:]), weight), linear(x, weight, gelu=True), linear(x, weight, out=place))
    assert sums[2] is place
    for result, expected in zip(sums, (F.linear(x, weight), F.gelu(F.linear(x, weight), approximate="tanh")) * 2, strict=False):
        (gradient,) = torch.autograd.grad(result.sum(), weight, retain_graph=True)
        assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), weight, retain_graph=True)[0], rtol=1e-4, atol=1e-4)
