"""LayerNorm with modulation and the gated residual addition: kernels against a float64 truth."""

import pytest
import torch
from kernel_runs import PLACES, check_error, drawn, poisoned, run_kernel
from torch import Tensor
from torch.nn import functional as F

from uso_engine.verification.measure import relative_error
from uso_kernels.gated_residual import (
    gated_residual,
    gated_residual_into,
    summed,
)
from uso_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_into
from uso_kernels.ragged import Ragged
from uso_kernels.rows import QuantizedRows, new_quantized, parts, quantize_rows_reference

Place = tuple[str, torch.dtype]
WIDTHS = [64, 200, 3072]


def operands(width: int, place: Place) -> dict[str, Tensor]:
    """Two sequences of ragged lengths; rows are strided and the modulation vectors are views of one table."""
    layout = Ragged.pack([21, 7], place[0])
    table = drawn(2, 3, width, seed=1, place=place)
    return {
        "x": drawn(layout.rows, width + 8, seed=2, place=place)[:, :width],
        "y": drawn(layout.rows, 2 * width, seed=3, place=place)[:, width:],
        "gate": table[:, 0],
        "shift": table[:, 1],
        "scale": table[:, 2],
        "tiles": layout.tile_sequence,
    }


# Plain PyTorch and the truth are written here, with nothing of the modules: what kernel and reference share shows in neither.


def of_rows(table: Tensor, given: dict[str, Tensor]) -> Tensor:
    """A sequence's vector beside each of its rows, in float64."""
    return torch.stack([table[int(sequence)].double() for sequence in given["tiles"] for _ in range(16)])


def plain_norm(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    """With torch's own LayerNorm, in float32, then rounded to x's type."""
    scale, shift = (of_rows(given[name], given).float() for name in ("scale", "shift"))
    return (F.layer_norm(x.float(), x.shape[1:], eps=1e-6) * (1 + scale) + shift).to(x.dtype)


def plain_sum(given: dict[str, Tensor]) -> Tensor:
    total = given["x"].float() + of_rows(given["gate"], given).float() * given["y"].float()
    return total.to(given["x"].dtype)


def true_norm(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The formula of the module's docstring in float64."""
    x = x.double()
    centred = x - x.sum(1, keepdim=True) / x.shape[1]
    deviation = (centred.square().sum(1, keepdim=True) / x.shape[1] + 1e-6).sqrt()
    return centred / deviation * (1 + of_rows(given["scale"], given)) + of_rows(given["shift"], given)


def true_sum(given: dict[str, Tensor]) -> Tensor:
    return given["x"].double() + of_rows(given["gate"], given) * given["y"].double()


def true_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits of float64 numbers: scales in float64, and values as floats."""
    limit = 127 if dtype == torch.int8 else 448
    scales = x.abs().amax(1) / limit
    values = x / scales[:, None]
    return scales, values.round() if dtype == torch.int8 else values.to(dtype).double()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", PLACES)
def test_layer_norm_modulate(place: Place, width: int) -> None:
    given = operands(width, place)
    out = poisoned(*given["x"].shape, dtype=place[1], device=place[0])
    run_kernel(layer_norm_modulate_into, given["x"], given["shift"], given["scale"], given["tiles"], out, None)
    check_error(out, plain_norm(given["x"], given), true_norm(given["x"], given))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", PLACES)
def test_gated_residual(place: Place, width: int, with_norm: bool) -> None:
    given = operands(width, place)
    total, out = (poisoned(*given["x"].shape, dtype=place[1], device=place[0]) for _ in range(2))
    names = ("x", "y", "gate")
    norm = (given["shift"], given["scale"]) if with_norm else (None, None)
    run_kernel(gated_residual_into, *(given[n] for n in names), *norm, given["tiles"], total, out if with_norm else None, None)
    eager, true_total = plain_sum(given), true_sum(given)
    check_error(total, eager, true_total)
    if with_norm:
        check_error(out, plain_norm(eager, given), true_norm(true_total, given))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_quantising_endings(place: Place, dtype: torch.dtype) -> None:
    """Values and scales are the true ones, but for values that lie on the border between two numbers."""
    given = operands(200, place)
    x, shift, scale, tiles = given["x"], given["shift"], given["scale"], given["tiles"]
    total = poisoned(*x.shape, dtype=place[1], device=place[0])
    for name, source in (("norm", x), ("gated", plain_sum(given))):
        values, scales = new_quantized(x.shape[0], x.shape[1], dtype, x.device)
        values.copy_(poisoned(*x.shape, dtype=dtype, device=place[0]))
        scales.fill_(float("nan"))
        if name == "norm":
            run_kernel(layer_norm_modulate_into, x, shift, scale, tiles, values, scales)
        else:
            run_kernel(gated_residual_into, x, given["y"], given["gate"], shift, scale, tiles, total, values, scales)
        expected_scales, expected = true_rows(true_norm(source, given), dtype)
        torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-3 if place[1] == torch.float16 else 1e-5, atol=0)
        is_equal = values.double() == expected
        assert is_equal.float().mean() > 0.99
        rounding = 2.0 if dtype == torch.int8 else 32.0
        assert (values.double() - expected).abs().max() <= rounding


def test_one_sequence_does_not_reach_another() -> None:
    """NaN in one sequence stays there."""
    given = operands(64, ("cpu", torch.float32))
    x = given["x"].clone()
    x[32:] = float("nan")
    out = poisoned(*x.shape, dtype=x.dtype)
    run_kernel(layer_norm_modulate_into, x, given["shift"], given["scale"], given["tiles"], out, None)
    assert torch.isfinite(out[:32]).all()
    assert out[32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_keep_torchs_rules(dtype: torch.dtype) -> None:
    given = operands(64, ("cpu", dtype))
    x, shift, scale, tiles = given["x"], given["shift"], given["scale"], given["tiles"]
    values, scales = new_quantized(x.shape[0], x.shape[1], torch.int8, x.device)
    total, out = x.contiguous().clone(), x.contiguous().clone()
    torch.library.opcheck(layer_norm_modulate_into.op, (x, shift, scale, tiles, out, None))
    torch.library.opcheck(layer_norm_modulate_into.op, (x, shift, scale, tiles, values, scales))
    y, gate = given["y"], given["gate"]
    torch.library.opcheck(gated_residual_into.op, (x, y, gate, None, None, tiles, total, None, None))
    torch.library.opcheck(gated_residual_into.op, (x, y, gate, shift, scale, tiles, total, out, None))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_public_functions_agree_in_floats_and_in_eight_bits(dtype: torch.dtype) -> None:
    given = operands(64, ("cpu", torch.float32))
    x, y, gate, shift, scale, tiles = given.values()
    total, expected = gated_residual(x, y, gate, tiles, (shift, scale))
    assert torch.equal(total, summed(x, y, gate, tiles))
    assert torch.equal(gated_residual(x, y, gate, tiles)[0], total)
    again, rows = gated_residual(x, y, gate, tiles, (shift, scale), dtype)
    assert torch.equal(again, total)
    norm = layer_norm_modulate(x, shift, scale, tiles)
    for result, floats in ((rows, expected), (layer_norm_modulate(x, shift, scale, tiles, dtype), norm)):
        assert isinstance(result, QuantizedRows) and isinstance(floats, Tensor)
        values, scales = quantize_rows_reference(floats, dtype)
        assert torch.equal(result.values.view(torch.int8), values.view(torch.int8))
        assert torch.equal(result.scale, scales)


def test_gradients_flow() -> None:
    given = operands(64, ("cpu", torch.float32))
    x, y, gate, shift, scale, tiles = (v.clone().requires_grad_() if v.is_floating_point() else v for v in given.values())
    total, out = gated_residual(x, y, gate, tiles, (shift, scale))
    assert isinstance(out, Tensor)
    (total.sum() + out.square().sum()).backward()
    for name, tensor in (("x", x), ("y", y), ("gate", gate), ("shift", shift), ("scale", scale)):
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


def test_bad_operands_are_refused() -> None:
    given = operands(64, ("cpu", torch.float32))
    x, shift, scale, tiles = given["x"], given["shift"], given["scale"], given["tiles"]
    with pytest.raises(ValueError, match="contiguous columns"):
        layer_norm_modulate(x.t().contiguous().t(), shift, scale, tiles)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        layer_norm_modulate(x, shift.half(), scale, tiles)
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        layer_norm_modulate(x, shift[:, :32], scale, tiles)
    with pytest.raises(ValueError, match="multiple of 16"):
        layer_norm_modulate(x[:20], shift, scale, tiles)
    with pytest.raises(ValueError, match="multiple of 16"):
        layer_norm_modulate(x[:0], shift, scale, tiles)
    with pytest.raises(ValueError, match="tile_sequence"):
        layer_norm_modulate(x, shift, scale, tiles[:1])
    with pytest.raises(ValueError, match="int32"):
        layer_norm_modulate(x, shift, scale, tiles.long())
    with pytest.raises(ValueError, match="16384"):
        layer_norm_modulate(torch.empty(16, 20000), torch.empty(1, 20000), torch.empty(1, 20000), tiles[:1])
    with pytest.raises(ValueError, match="quantised to"):
        layer_norm_modulate(x, shift, scale, tiles, torch.float16)
    with pytest.raises(ValueError, match="y must be"):
        gated_residual(x, given["y"][:16], given["gate"], tiles)


@pytest.mark.parametrize("dtype", [None, torch.int8])
@torch.no_grad()
def test_blocks_of_rows_have_their_own_sequences_vectors(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU computes a reference in blocks of rows, a tile at a time."""
    given = operands(200, ("cpu", torch.float32))
    x, norm, tiles = given["x"], (given["shift"], given["scale"]), given["tiles"]
    found = []
    for numbers in (2**30, 1):
        monkeypatch.setattr("uso_kernels.cpu.BLOCK_NUMBERS", numbers)
        total, added = gated_residual(x, given["y"], given["gate"], tiles, norm, dtype)
        assert added is not None
        rows = (*parts(layer_norm_modulate(x, *norm, tiles, dtype)), *parts(added))
        found.append((total, *(part for part in rows if part is not None)))
    for whole, in_blocks in zip(*found, strict=True):
        assert torch.equal(whole, in_blocks)
    if dtype is None:
        assert relative_error(found[1][1].double(), true_norm(x, given)) < 1e-6
