"""Kernels that move rows: row quantisation, splitting the joint order, GELU beside attention, the Euler step."""

import math

import pytest
import torch
from kernel_runs import PLACES, check_error, drawn, poisoned, run_kernel
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.euler_update import euler_update, euler_update_into, guide_reference
from uso_kernels.gelu_concat import gelu_concat, gelu_concat_into, joined
from uso_kernels.quantize_rows import quantize_rows, quantize_rows_into
from uso_kernels.rows import SCALE_ROWS, QuantizedRows, new_quantized, quantize_rows_reference
from uso_kernels.split_streams import split_streams, split_streams_into

Place = tuple[str, torch.dtype]
EIGHT_BITS = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)


@EIGHT_BITS
@pytest.mark.parametrize("place", PLACES)
def test_quantize_rows_equals_the_reference(place: Place, dtype: torch.dtype) -> None:
    x = drawn(33, 308, seed=0, place=place)[:, 3:303] * torch.logspace(-3, 3, 33, device=place[0])[:, None].to(place[1])
    x[3] = 0
    values, scales = new_quantized(x.shape[0], x.shape[1], dtype, x.device)
    values.copy_(poisoned(*x.shape, dtype=dtype, device=place[0]))
    run_kernel(quantize_rows_into, x, values, scales)
    expected, expected_scales = quantize_rows_reference(x, dtype)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected.float())


@EIGHT_BITS
def test_quantize_rows_rounds_and_keeps_what_is_broken_broken(dtype: torch.dtype) -> None:
    x = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-25, 25, 40)[:, None]
    x[4], x[5, 7], x[6, 8] = 0, float("nan"), float("inf")
    launched = new_quantized(x.shape[0], x.shape[1], dtype, x.device)
    run_kernel(quantize_rows_into, x, *launched)
    for values, scales in (quantize_rows(x, dtype), launched):
        result = values.float() * scales[:, None]
        sound = [row for row in range(40) if row not in (4, 5, 6)]
        error = (result.double() - x.double())[sound].norm(dim=1) / x[sound].double().norm(dim=1)
        # Half a step of 1 / 127 of the largest; e4m3 keeps 4 bits, uniform rounding error 2^-4 / sqrt(3) at most.
        assert error.max() < (0.02 if dtype == torch.int8 else 0.036)
        assert not result[4].any()
        assert result[5].isnan().all()
        assert not torch.isfinite(result[6]).all()
    assert scales.untyped_storage().nbytes() == SCALE_ROWS * 4


@pytest.mark.parametrize("place", PLACES)
def test_split_streams(place: Place) -> None:
    joint = drawn(48, 210, seed=0, place=place)[:, 5:205]
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(1)).to(place[0])
    text, image = (poisoned(n, 200, dtype=place[1], device=place[0]) for n in (16, 32))
    run_kernel(split_streams_into, joint, rows[:16], rows[16:], text, None, image, None)
    assert torch.equal(text, joint[rows[:16]])
    assert torch.equal(image, joint[rows[16:]])
    text_q, image_q = (new_quantized(n, 200, torch.int8, joint.device) for n in (16, 32))
    run_kernel(split_streams_into, joint, rows[:16], rows[16:], *text_q, *image_q)
    for (values, scales), part in zip((text_q, image_q), (rows[:16], rows[16:]), strict=True):
        expected, expected_scales = quantize_rows_reference(joint[part], torch.int8)
        assert torch.equal(values, expected)
        assert torch.equal(scales, expected_scales)


def true_gelu(x: Tensor) -> Tensor:
    """The tanh form as its authors give it (Hendrycks and Gimpel 2016), in float64 and written apart from the module."""
    wide = x.double()
    return 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


@pytest.mark.parametrize("widths", [(72, 250), (0, 250), (3072, 12288)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_gelu_concat(place: Place, widths: tuple[int, int]) -> None:
    width, hidden_width = widths
    rows = 5 if width == 3072 else 32
    attended = drawn(rows, width, seed=0, place=place) if width else None
    hidden = drawn(rows, 2 * hidden_width, seed=1, place=place)[:, :hidden_width] * 3
    out = poisoned(rows, width + hidden_width, dtype=place[1], device=place[0])
    run_kernel(gelu_concat_into, attended, hidden, out, None)
    truth, plain = true_gelu(hidden), F.gelu(hidden, approximate="tanh")
    if attended is not None:
        truth, plain = torch.cat((attended.double(), truth), 1), torch.cat((attended, plain), 1)
    check_error(out, plain, truth)
    check_error(joined(attended, hidden), plain, truth)
    values, scales = new_quantized(out.shape[0], out.shape[1], torch.int8, out.device)
    run_kernel(gelu_concat_into, attended, hidden, values, scales)
    expected, expected_scales = quantize_rows_reference(truth.float(), torch.int8)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    assert (values.float() - expected.float()).abs().max() <= 1
    assert (values == expected).float().mean() > 0.99


def test_gelu_concat_leaves_what_attention_wrote() -> None:
    out = poisoned(16, 100, dtype=torch.float32)
    out[:, :40] = 7.0
    hidden = torch.randn(16, 60)
    gelu_concat_into(None, hidden, out, None)
    assert (out[:, :40] == 7.0).all()
    torch.testing.assert_close(out[:, 40:], torch.nn.functional.gelu(hidden, approximate="tanh"))
    out[:, 40:] = float("nan")
    run_kernel(gelu_concat_into, None, hidden, out, None)
    assert (out[:, :40] == 7.0).all()
    assert torch.isfinite(out[:, 40:]).all()


def test_gelu_may_be_written_over_the_hidden_layer() -> None:
    hidden = torch.randn(16, 60)
    expected = torch.nn.functional.gelu(hidden, approximate="tanh")
    assert gelu_concat(None, hidden, out=hidden) is hidden
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("place", PLACES)
def test_gelu_is_exact_far_from_zero(place: Place) -> None:
    hidden = torch.tensor([[-60000.0, -50.0, -10.0, 0.0, 10.0, 50.0, 60000.0]]).to(place[1]).to(place[0])
    out = poisoned(1, 7, dtype=place[1], device=place[0])
    run_kernel(gelu_concat_into, None, hidden, out, None)
    torch.testing.assert_close(out, hidden.clamp(min=0), rtol=0, atol=1e-30)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_euler_update(place: Place, guided: bool) -> None:
    latents = drawn(48, 64, seed=0, place=(place[0], torch.float32))
    velocity = drawn(64, 64, seed=1, place=place)
    delta = drawn(48, seed=2, place=(place[0], torch.float32))
    negative = guidance = None
    if guided:
        negative = torch.full((48,), -1, device=place[0])
        negative[16:32] = torch.arange(48, 64)
        guidance = torch.full((48,), 2.5, device=place[0])
    result, after = poisoned(48, 64, dtype=torch.float32, device=place[0]), latents.clone()
    run_kernel(euler_update_into, after, velocity, delta, negative, guidance, result)
    expected = velocity[:48].double()
    if guided:
        expected[16:32] = velocity[48:].double() + 2.5 * (expected[16:32] - velocity[48:].double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.double(), latents.double() + delta.double()[:, None] * expected, rtol=1e-6, atol=2e-6)
    assert torch.allclose(guide_reference(velocity, 48, negative, guidance).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(euler_update(latents, velocity, delta, negative, guidance), result, rtol=1e-6, atol=1e-6)
    assert torch.allclose(latents, after, rtol=1e-6, atol=2e-6)


def test_row_offsets_past_two_to_the_31() -> None:
    """The last row starts past 2^31 elements; only the pages that are touched exist."""
    stride, rows, width = 2**27 + 32, 17, 48
    try:
        storage = torch.empty(stride * (rows - 1) + width, dtype=torch.int8)
    except RuntimeError:
        pytest.skip("this machine does not lend 2 GiB of address space")
    x = storage.as_strided((rows, width), (stride, 1))
    x.zero_()
    x[rows - 1] = torch.arange(width)
    assert (rows - 1) * stride > 2**31
    values, scales = new_quantized(rows, width, torch.int8, x.device)
    run_kernel(quantize_rows_into, x, values, scales)
    assert not values[: rows - 1].any()
    assert torch.equal((values[rows - 1] * scales[rows - 1]).round(), torch.arange(width).float())


def test_operations_keep_torchs_rules() -> None:
    x = torch.randn(16, 64)
    values, scales = new_quantized(16, 64, torch.int8, x.device)
    torch.library.opcheck(quantize_rows_into.op, (x, values, scales))
    rows = torch.arange(16)
    torch.library.opcheck(split_streams_into.op, (x, rows[:4], rows[4:], x[:4].clone(), None, x[4:].clone(), None))
    torch.library.opcheck(gelu_concat_into.op, (x, x.clone(), torch.empty(16, 128), None))
    torch.library.opcheck(gelu_concat_into.op, (None, x, values, scales))
    torch.library.opcheck(euler_update_into.op, (x, x.clone(), x[:, 0].contiguous(), None, None, torch.empty(16, 64)))


def test_public_functions_agree_with_plain_torch() -> None:
    x, y = torch.randn(32, 64), torch.randn(32, 96)
    rows = torch.randperm(32)
    text, image = split_streams(x, rows[:10], rows[10:])
    assert isinstance(text, Tensor) and isinstance(image, Tensor)
    assert torch.equal(torch.cat((text, image)), x[rows])
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for result, part in zip(split_streams(x, rows[:10], rows[10:], dtype), (rows[:10], rows[10:]), strict=True):
            assert isinstance(result, QuantizedRows)
            values, scales = quantize_rows_reference(x[part], dtype)
            assert torch.equal(result.values.view(torch.int8), values.view(torch.int8))
            assert torch.equal(result.scale, scales)
    activated = gelu_concat(x, y, torch.int8)
    assert isinstance(activated, QuantizedRows)
    values, scales = activated
    expected = torch.cat((x, torch.nn.functional.gelu(y, approximate="tanh")), dim=1)
    torch.testing.assert_close(values.float() * scales[:, None], expected, rtol=0, atol=float(scales.max()) * 0.51)
    leaf = y.clone().requires_grad_()
    floats = gelu_concat(x, leaf)
    assert isinstance(floats, Tensor)
    floats.sum().backward()
    assert leaf.grad is not None
    assert math.isfinite(float(leaf.grad.sum()))


def test_bad_operands_are_refused() -> None:
    x = torch.randn(16, 64)
    with pytest.raises(ValueError, match="float32, bfloat16"):
        quantize_rows(x.int(), torch.int8)
    with pytest.raises(ValueError, match="quantised to"):
        quantize_rows(x, torch.float16)
    with pytest.raises(ValueError, match="int64"):
        split_streams(x, torch.arange(4, dtype=torch.int32), torch.arange(4, 16))
    with pytest.raises(ValueError, match="16 rows"):
        gelu_concat(x[:3], x)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        gelu_concat(x.half(), x)
    with pytest.raises(ValueError, match="quantised to"):
        gelu_concat(None, x, torch.float16)
    with pytest.raises(ValueError, match="out must be"):
        gelu_concat(None, x, out=torch.empty(3, 64))
    with pytest.raises(ValueError, match="latents must be float32"):
        euler_update(x.half(), x, x[:, 0])
    with pytest.raises(ValueError, match="together"):
        euler_update(x, x, x[:, 0].contiguous(), torch.arange(16))
    with pytest.raises(ValueError, match="delta must be"):
        euler_update(x, x, x[:3, 0].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_rows_that_are_no_whole_vectors_have_the_same_bits_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch computes GELU of a vector's rest by another function than of the vector: a block of whole tiles has no rest."""
    attended, hidden = (drawn(1600, width, seed=0, place=("cpu", dtype), mean=-0.5) for width in (12, 20))
    for beside in (None, attended):
        found = []
        for numbers in (2**30, 1):
            monkeypatch.setattr("uso_kernels.cpu.BLOCK_NUMBERS", numbers)
            rows = gelu_concat(beside, hidden, torch.int8)
            assert isinstance(rows, QuantizedRows)
            found.append(rows)
        (values, scales), (block_values, block_scales) = found
        assert torch.equal(values, block_values) and torch.equal(scales, block_scales)
