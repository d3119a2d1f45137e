"""What PyTorch computes number by number has the bits of whole vectors, however many numbers and threads there are."""

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from several_threads import drawn, threads
from torch import Tensor
from torch.nn import functional as F

from uso_engine.model.modulation import Embedder
from uso_kernels.matmul.linear import linear
from uso_kernels.matmul.product import Product
from uso_kernels.ragged import Ragged
from uso_kernels.whole_vectors import gelu, silu

LENGTHS = (48, 320, 16, 32)
# PyTorch divides a pass over many numbers into equal parts, which for 3 and 5 threads are seldom of whole vectors.
THREADS = (1, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize(
    ("ours", "torchs"), [(gelu, partial(F.gelu, approximate="tanh")), (silu, F.silu)], ids=["GELU", "SiLU"]
)
def test_an_activation_is_pytorchs_of_whole_vectors(
    ours: Callable[[Tensor], Tensor],
    torchs: Callable[[Tensor], Tensor],
    count: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of any number of numbers and with the gradient that it has."""
    x = drawn(5 * 32768 + 64 + 13, dtype=dtype)
    expected = by_whole_vectors(torchs, x)
    with threads(count):
        for size in (0, 1, 63, 64, 65, 16384, 16385, 20000, 32768, 32769, 67840, 3 * 32768, len(x)):
            assert torch.equal(ours(x[:size]), expected[:size]), size
        assert torch.equal(ours(x[:200].view(2, 100).t()), expected[:200].view(2, 100).t())
        leaf, twin = (x[:40].clone().requires_grad_() for _ in range(2))
        ours(leaf).sum().backward()
        torchs(twin).sum().backward()
    assert leaf.grad is not None and twin.grad is not None
    assert torch.equal(leaf.grad, twin.grad)
    # So many threads that not each of them gets a vector: it is one thread's then.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert torch.equal(ours(x[:20000]), expected[:20000])


def by_whole_vectors(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a number of whole vectors none is left over where one thread computes them."""
    with threads(1):
        numbers = x.flatten()
        return compute(torch.cat((numbers, numbers.new_zeros(-len(numbers) % 64))))[: len(numbers)].view_as(x)


@pytest.mark.parametrize("count", [1, 3])
def test_gelu_over_itself_and_into_a_view(count: int) -> None:
    x = drawn(3 * 32768 + 64 + 13, dtype=torch.float32)
    expected = by_whole_vectors(partial(F.gelu, approximate="tanh"), x)
    with threads(count):
        over, wide = x.clone(), x.new_zeros(2, len(x)).t()
        assert gelu(over, over) is over
        assert torch.equal(over, expected)
        assert torch.equal(gelu(x, wide[:, 1]), expected)
    assert not wide[:, 0].any()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "widened"])
@torch.no_grad()
def test_gelu_behind_a_product_depends_on_each_number_alone(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the packed product, of one sequence alone, prepared, and into a wider result: whatever the threads are."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: False)
    dtype = torch.bfloat16 if kind == "widened" else getattr(torch, kind)
    layout, tanh = Ragged.pack(LENGTHS), partial(F.gelu, approximate="tanh")
    # 97 columns of 320 rows: more than one thread's, and not of whole vectors.
    x, weight, bias = drawn(layout.rows, 33, dtype=dtype), drawn(97, 33, dtype=dtype, seed=1), drawn(97, dtype=dtype, seed=2)
    with threads(count):
        for sequences in (layout, None):
            spans = (slice(0, layout.rows),) if sequences is None else layout.row_slices
            wide = torch.float32 if kind == "widened" else dtype
            sums = [F.linear(x[rows].to(wide), weight.to(wide), bias.to(wide)) for rows in spans]
            expected = torch.cat([by_whole_vectors(tanh, each) for each in sums]).to(dtype)
            place = x.new_zeros(layout.rows, 131)
            found = {
                "packed": linear(x, weight, bias, sequences, gelu=True),
                "prepared": Product(weight, bias, sequences).activated(x),
                "placed": linear(x, weight, bias, sequences, gelu=True, out=place[:, 34:]),
            }
            # Widened sums are kept for some rows at a time, of which each is a product.
            if kind != "widened" or sequences is not None:
                differing = {name: int((y != expected).sum()) for name, y in found.items()}
                assert not any(differing.values()), differing
            assert not place[:, :34].any()


@pytest.mark.parametrize("count", [3, 5])
@torch.no_grad()
def test_modulations_silu_depends_on_each_number_alone(count: int) -> None:
    """A product with the unit matrix is exact: what comes out is SiLU's own bits."""
    embedder = Embedder(97, 97)
    for layer in (embedder.in_layer, embedder.out_layer):
        layer.weight.copy_(torch.eye(97))
        assert layer.bias is not None
        layer.bias.zero_()
    x = drawn(700, 97, dtype=torch.float32)
    with threads(count):
        assert torch.equal(embedder(x), by_whole_vectors(F.silu, x))


def test_no_other_pass_depends_on_a_numbers_place() -> None:
    """PyTorch's own GELU, SiLU and sigmoid are called where whole vectors are seen to and nowhere else a step goes through."""
    root = Path(__file__).parents[1]
    places = [
        root / "kernels/uso_kernels",
        root / "uso_engine/model",
        root / "uso_engine/precision",
        root / "uso_engine/sampling",
    ]
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for place in places
        for path in sorted(place.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("gelu", "silu", "sigmoid", "sigmoid_")
        # Triton's, in a kernel, and a switch of ours.
        and ast.unparse(node.value) not in ("tl", "self", "run.fusion", "torch.ops.aten")
    ]
    assert [place.split(":")[0] for place in found] == ["kernels/uso_kernels/whole_vectors.py"] * 2, found
