"""The products of quantised matrices: against float64, their kernels against their references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import ScalingType, scaled_mm

from uso_engine.verification.measure import relative_error
from uso_kernels.matmul import fp8, int4, int8
from uso_kernels.matmul.linear import linear
from uso_kernels.quantize_rows import quantize_rows

WIDTH = 3072
ROWS = 48
Product = Callable[..., Tensor]
ON_A_GPU = torch.cuda.is_available()


def operands(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations whose mean is not zero, a weight, a bias."""
    generator = torch.Generator().manual_seed(rows + n + k)
    x = torch.randn(rows, k, generator=generator) + 0.3
    return x, torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("element", "multiply"), [(torch.float8_e4m3fn, fp8.scaled_matmul), (torch.int8, int8.int8_matmul)])
def test_product_of_the_quantised_values_is_exact_but_for_its_type(
    element: torch.dtype, multiply: Product, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(33, 96, WIDTH)
    (xq, xs), (wq, ws) = quantize_rows(x, element), quantize_rows(weight, element)
    truth = (xq.double() * xs.double()[:, None]) @ (wq.double() * ws.double()[:, None]).t() + bias.double()
    error = relative_error(multiply(xq, xs, wq, ws, bias, dtype=dtype), truth)
    assert error < (1e-6 if dtype == torch.float32 else 2.5e-3)


def test_int8_sums_are_exact_integers() -> None:
    """Ones everywhere at the largest value: float32 sums would be off beyond 2^24."""
    k = 15360
    x, ones = torch.full((16, k), 127, dtype=torch.int8), torch.ones(16)
    weight = x.clone()
    weight[:, 0] = 126
    y = torch._int_mm(x, weight.t())
    assert int(y[0, 0]) == 127 * 127 * (k - 1) + 127 * 126
    result = int8.int8_matmul(x, ones, weight, ones, dtype=torch.float64)
    assert torch.equal(result, y.float().double())


def test_rows_of_a_larger_matrix_give_the_same_bits() -> None:
    """`outputs` of a layer hands in a slice of the weight and of its scales."""
    x, weight, bias = operands(32, 160, 256)
    for element, multiply in ((torch.float8_e4m3fn, fp8.scaled_matmul), (torch.int8, int8.int8_matmul)):
        (xq, xs), (wq, ws) = quantize_rows(x, element), quantize_rows(weight, element)
        whole = multiply(xq, xs, wq, ws, bias, dtype=torch.float32)
        part = multiply(xq, xs, wq[48:], ws[48:], bias[48:], dtype=torch.float32)
        assert relative_error(part, whole[:, 48:]) < 1e-6
        strided = torch.empty(32, 512, dtype=element)[:, :256]
        strided.copy_(xq)
        assert relative_error(multiply(strided, xs, wq, ws, bias, dtype=torch.float32), whole) < 1e-6


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
    reason="this torch has its scaled product on a GPU alone, where test_quantization_gpu.py runs it",
)
def test_the_float8_launch_is_torchs_public_product() -> None:
    """It calls what lies below `scaled_mm`, which cannot write to memory of the caller's; on a CPU, too, where torch can."""
    x, weight, bias = operands(32, 96, 128)
    (xq, xs), (wq, ws) = quantize_rows(x, torch.float8_e4m3fn), quantize_rows(weight, torch.float8_e4m3fn)
    for added in (None, bias.bfloat16()):
        scales = (xs[:, None], ScalingType.RowWise, ws[None, :], ScalingType.RowWise)
        expected = scaled_mm(xq, wq.t(), *scales, bias=added, output_dtype=torch.bfloat16, use_fast_accum=True)
        y = torch.full((32, 96), float("nan"), dtype=torch.bfloat16)
        fp8.scaled_matmul_into.native(xq, xs, wq, ws, added, y)
        assert torch.equal(y, expected)


def test_scales_are_padded_where_a_gpu_reads_past_them() -> None:
    _, padded = quantize_rows(torch.randn(33, 64), torch.int8)
    assert fp8._padded(padded).data_ptr() == padded.data_ptr()
    bare = torch.rand(33)
    copied = fp8._padded(bare)
    assert torch.equal(copied, bare)
    assert copied.untyped_storage().nbytes() >= 256 * 4
    assert fp8._padded(padded[16:]).untyped_storage().nbytes() >= 256 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 64)}, "x must be a matrix of torch.int8"),
        ({"weight": torch.zeros(32, 48, dtype=torch.int8)}, "share K"),
        ({"weight": torch.zeros(24, 64, dtype=torch.int8)}, "multiples of 16"),
        ({"x_scale": torch.zeros(15)}, r"x_scale must be float32 of shape \(16,\)"),
        ({"weight_scale": torch.zeros(32, dtype=torch.float64)}, "weight_scale must be float32"),
        ({"bias": torch.zeros(31)}, "bias must have shape"),
    ],
)
def test_operands_that_do_not_belong_together(change: dict[str, Tensor], message: str) -> None:
    sound = {
        "x": torch.zeros(16, 64, dtype=torch.int8),
        "x_scale": torch.zeros(16),
        "weight": torch.zeros(32, 64, dtype=torch.int8),
        "weight_scale": torch.zeros(32),
        "bias": torch.zeros(32),
    }
    int8.int8_matmul(*sound.values())
    with pytest.raises(ValueError, match=message):
        int8.int8_matmul(*{**sound, **change}.values())


@pytest.mark.parametrize("group", [16, 64, 128])
def test_packed_codes_come_back(group: int) -> None:
    codes = torch.randint(0, 16, (37, 384), dtype=torch.uint8)
    packed = int4.pack_int4(codes, group)
    assert packed.shape == (37, 192)
    assert torch.equal(int4.unpack_int4(packed, group), codes)
    scale, shift = torch.rand(37, 384 // group).half(), torch.rand(37, 384 // group).half()
    expected = codes.double().view(37, -1, group) * scale.double()[:, :, None] - shift.double()[:, :, None]
    assert relative_error(int4.int4_dequantize(packed, scale, shift, dtype=torch.float32), expected.flatten(1)) < 1e-6


def test_int4_product_is_that_of_the_dequantised_weight() -> None:
    codes = torch.randint(0, 16, (48, 256), dtype=torch.uint8)
    packed, scale, shift = int4.pack_int4(codes, 128), torch.rand(48, 2).half(), torch.rand(48, 2).half()
    x, bias = torch.randn(3, 5, 256), torch.randn(48)
    expected = x.double() @ int4.int4_dequantize(packed, scale, shift, dtype=torch.float32).double().t() + bias.double()
    assert relative_error(linear(x, int4.int4_dequantize(packed, scale, shift, dtype=x.dtype), bias), expected) < 1e-6
    with pytest.raises(ValueError, match="power of two"):
        int4.int4_dequantize(packed[:, :96].contiguous(), scale, shift)
    with pytest.raises(ValueError, match="shift must be float16"):
        int4.int4_dequantize(packed, scale, shift.float())


@pytest.mark.skipif(ON_A_GPU, reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize(("rows", "n", "k"), [(33, 48, 80), (130, 144, 272)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_kernel_in_the_interpreter(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, n, k)
    (xq, xs), (wq, ws) = quantize_rows(x, torch.int8), quantize_rows(weight, torch.int8)
    for shift in (None, bias):
        y = torch.full((rows, n + 5), float("nan"), dtype=dtype)[:, :n]
        int8.int8_matmul_into.native(xq, xs, wq, ws, shift, y)
        expected = int8.int8_matmul(xq, xs, wq, ws, shift, dtype=torch.float64)
        assert relative_error(y, expected) <= 2 * relative_error(expected.to(dtype), expected) + 1e-7


@pytest.mark.skipif(ON_A_GPU, reason="the interpreter runs where there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int4_kernel_in_the_interpreter(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (37, 384), dtype=torch.uint8)
    packed, scale, shift = int4.pack_int4(codes, 128), torch.rand(37, 3).half(), torch.rand(37, 3).half()
    y = torch.full((37, 400), float("nan"), dtype=dtype)[:, :384]
    int4.int4_dequantize_into.native(packed, scale, shift, y)
    # A fused multiply-add rounds once where the reference rounds twice.
    expected = int4.int4_dequantize(packed, scale, shift, dtype=torch.float64)
    assert relative_error(y, expected) <= 2 * relative_error(expected.to(dtype), expected) + 1e-7


def test_operations_describe_themselves_rightly() -> None:
    x, weight, bias = operands(16, 32, 64)
    (xq, xs), (wq, ws) = quantize_rows(x, torch.int8), quantize_rows(weight, torch.int8)
    opcheck(int8.int8_matmul_into.op, (xq, xs, wq, ws, bias, torch.empty(16, 32)))
    (xq, xs), (wq, ws) = quantize_rows(x, torch.float8_e4m3fn), quantize_rows(weight, torch.float8_e4m3fn)
    # The schema check multiplies its own copies of the arguments, which torch cannot do in float8.
    opcheck(fp8.scaled_matmul_into.op, (xq, xs, wq, ws, bias, torch.empty(16, 32)), test_utils=("test_faketensor",))
    packed = torch.randint(0, 255, (32, 64), dtype=torch.uint8)
    opcheck(int4.int4_dequantize_into.op, (packed, torch.rand(32, 1).half(), torch.rand(32, 1).half(), torch.empty(32, 128)))
