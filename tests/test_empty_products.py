"""Products without rows, without columns, and over no columns, on a CPU: what the formula says of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from uso_kernels import cpu
from uso_kernels.matmul.fp8 import scaled_matmul
from uso_kernels.matmul.int4 import int4_dequantize, pack_int4, unpack_int4
from uso_kernels.matmul.int8 import int8_matmul
from uso_kernels.matmul.linear import linear, linear_of_parts
from uso_kernels.matmul.product import Product, ProductOfParts
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged

SHAPES = [(m, n, k) for m, n, k in product((0, 16), (0, 32), (0, 48)) if not (m and n and k)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
Shape = tuple[int, int, int]


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    y = x.double() @ weight.double().t()
    y = y if bias is None else y + bias.double()
    return F.gelu(y, approximate="tanh") if gelu else y


def assert_is(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_of_floats(
    shape: Shape, dtype: torch.dtype, native: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With GELU and without, in memory of their own and given, of one sequence and of none; and those that are prepared."""
    if not native:
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    elif dtype == torch.bfloat16 and not cpu.multiplies_bfloat16():
        pytest.skip("this CPU multiplies no bfloat16")
    m, n, k = shape
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    sequences = Ragged.pack([m], torch.device("cpu")) if m else None
    for gelu, given, packed, grad in product((False, True), repeat=4):
        out = torch.full((m, n), torch.nan, dtype=dtype) if given else None
        with torch.set_grad_enabled(grad):
            found = linear(x, weight, bias, sequences if packed else None, gelu=gelu, out=out)
        assert out is None or found is out
        assert_is(found, truth(x, weight, bias, gelu=gelu), dtype)
    assert linear(x[None, None], weight, bias, gelu=True).shape == (1, 1, m, n)
    with torch.no_grad():
        prepared = Product(weight, bias, sequences)
        assert_is(prepared(x), truth(x, weight, bias), dtype)
        assert_is(prepared(x, out=torch.full((m, n), torch.nan, dtype=dtype)), truth(x, weight, bias), dtype)
        assert_is(prepared.activated(x), truth(x, weight, bias, gelu=True), dtype)
        for widths in ((k,), (k, 0), (0, k)):
            parts = x.split(list(widths), dim=1)
            assert_is(linear_of_parts(parts, weight, bias), truth(x, weight, bias), dtype)
            assert_is(ProductOfParts(weight, bias, widths, sequences)(*parts), truth(x, weight, bias), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("multiply", "element"), [(int8_matmul, torch.int8), (scaled_matmul, torch.float8_e4m3fn)])
def test_products_of_quantised_rows(shape: Shape, multiply: object, element: torch.dtype) -> None:
    assert callable(multiply)
    m, n, k = shape
    x, weight = torch.randn(m, k), torch.randn(n, k)
    if k:
        (x_values, x_scale), (weight_values, weight_scale) = quantize_rows(x, element), quantize_rows(weight, element)
    else:  # Rows of nothing have no largest value, and nothing makes them.
        with pytest.raises(ValueError, match="rows of 1 to 16384 columns"):
            quantize_rows(x, element)
        x_values, x_scale, weight_values, weight_scale = x.to(element), torch.ones(m), weight.to(element), torch.ones(n)
    for bias in (torch.randn(n), None):
        found = multiply(x_values, x_scale, weight_values, weight_scale, bias, dtype=torch.float32)
        wide = x_values.float() * x_scale[:, None], weight_values.float() * weight_scale[:, None]
        assert_is(found, truth(*wide, bias), torch.float32)


def test_weights_of_four_bits() -> None:
    codes = torch.zeros(0, 64, dtype=torch.uint8)
    packed, scale = pack_int4(codes, 32), torch.zeros(0, 2, dtype=torch.float16)
    assert packed.shape == (0, 32) and unpack_int4(packed, 32).shape == codes.shape
    assert int4_dequantize(packed, scale, scale).shape == (0, 64)
    for rows in (0, 16):
        none = torch.zeros(rows, 0, dtype=torch.float16)
        with pytest.raises(ValueError, match="0 columns in 0 groups"):
            int4_dequantize(none.to(torch.uint8), none, none)
