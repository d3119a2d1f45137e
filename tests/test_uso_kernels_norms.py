"""LayerNorm with modulation and the gated residual addition: kernels against a float64 truth."""

import pytest
import torch
from kernel_runs import PLACES, check_error, drawn, poisoned, run_kernel
from torch import Tensor

from uso_kernels.gated_residual import (
    gated_residual,
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantized,
    gated_residual_op,
    gated_residual_reference,
)
from uso_kernels.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_op,
    layer_norm_modulate_quantized,
    layer_norm_modulate_reference,
    normalized_wide,
)
from uso_kernels.quantize_rows import new_quantized, quantize_rows_reference
from uso_kernels.ragged import Ragged

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


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def normed(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    return layer_norm_modulate_reference(x, given["shift"], given["scale"], given["tiles"])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", PLACES)
def test_layer_norm_modulate(place: Place, width: int) -> None:
    given = operands(width, place)
    out = poisoned(*given["x"].shape, dtype=place[1], device=place[0])
    run_kernel(layer_norm_modulate_op, given["x"], given["shift"], given["scale"], given["tiles"], 1e-6, out, None)
    check_error(out, normed(given["x"], given), normed(wide(given)["x"], wide(given)))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("place", PLACES)
def test_gated_residual(place: Place, width: int, with_norm: bool) -> None:
    given, truth = operands(width, place), wide(operands(width, place))
    total, out = (poisoned(*given["x"].shape, dtype=place[1], device=place[0]) for _ in range(2))
    names = ("x", "y", "gate")
    norm = (given["shift"], given["scale"]) if with_norm else (None, None)
    run_kernel(
        gated_residual_op, *(given[n] for n in names), *norm, given["tiles"], 1e-6, total, out if with_norm else None, None
    )
    eager, true_total = (gated_residual_reference(g["x"], g["y"], g["gate"], g["tiles"]) for g in (given, truth))
    check_error(total, eager, true_total)
    if with_norm:
        check_error(out, normed(eager, given), normed(true_total, truth))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_quantising_endings(place: Place, dtype: torch.dtype) -> None:
    """Values and scales are those of the reference, but for values that lie on the border between two numbers."""
    given = operands(200, place)
    x, shift, scale, tiles = given["x"], given["shift"], given["scale"], given["tiles"]
    total = poisoned(*x.shape, dtype=place[1], device=place[0])
    summed = gated_residual_reference(x, given["y"], given["gate"], tiles)
    for name, source in (("norm", x), ("gated", summed)):
        values, scales = new_quantized(x.shape[0], x.shape[1], dtype, x.device)
        values.copy_(poisoned(*x.shape, dtype=dtype, device=place[0]))
        scales.fill_(float("nan"))
        if name == "norm":
            run_kernel(layer_norm_modulate_op, x, shift, scale, tiles, 1e-6, values, scales)
        else:
            run_kernel(gated_residual_op, x, given["y"], given["gate"], shift, scale, tiles, 1e-6, total, values, scales)
        expected, expected_scales = quantize_rows_reference(normalized_wide(source, shift, scale, tiles, 1e-6), dtype)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-3 if place[1] == torch.float16 else 1e-5, atol=0)
        is_equal = values.float() == expected.float()
        assert is_equal.float().mean() > 0.99
        rounding = 2.0 if dtype == torch.int8 else 32.0
        assert (values.float() - expected.float()).abs().max() <= rounding


def test_one_sequence_does_not_reach_another() -> None:
    """NaN in one sequence stays there."""
    given = operands(64, ("cpu", torch.float32))
    x = given["x"].clone()
    x[32:] = float("nan")
    out = poisoned(*x.shape, dtype=x.dtype)
    run_kernel(layer_norm_modulate_op, x, given["shift"], given["scale"], given["tiles"], 1e-6, out, None)
    assert torch.isfinite(out[:32]).all()
    assert out[32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations_keep_torchs_rules(dtype: torch.dtype) -> None:
    given = operands(64, ("cpu", dtype))
    x, shift, scale, tiles = given["x"], given["shift"], given["scale"], given["tiles"]
    values, scales = new_quantized(x.shape[0], x.shape[1], torch.int8, x.device)
    total, out = x.contiguous().clone(), x.contiguous().clone()
    torch.library.opcheck(layer_norm_modulate_op, (x, shift, scale, tiles, 1e-6, out, None))
    torch.library.opcheck(layer_norm_modulate_op, (x, shift, scale, tiles, 1e-6, values, scales))
    y, gate = given["y"], given["gate"]
    torch.library.opcheck(gated_residual_op, (x, y, gate, None, None, tiles, 1e-6, total, None, None))
    torch.library.opcheck(gated_residual_op, (x, y, gate, shift, scale, tiles, 1e-6, total, out, None))


def test_public_functions_write_where_they_are_told() -> None:
    given = operands(64, ("cpu", torch.float32))
    x, y, gate, shift, scale, tiles = given.values()
    x = x.contiguous()
    expected_total, expected = gated_residual_layer_norm_modulate(x, y, gate, shift, scale, tiles)
    copy, buffer = x.clone(), torch.empty_like(x)
    total, out = gated_residual_layer_norm_modulate(copy, y, gate, shift, scale, tiles, out=(copy, buffer))
    assert total is copy
    assert out is buffer
    assert torch.equal(total, expected_total)
    assert torch.equal(out, expected)
    assert torch.equal(gated_residual(x, y, gate, tiles), expected_total)
    again, (values, scales) = gated_residual_layer_norm_modulate_quantized(x, y, gate, shift, scale, tiles, torch.int8)
    assert torch.equal(again, expected_total)
    torch.testing.assert_close(values.float() * scales[:, None], expected, rtol=0, atol=float(scales.max()) * 0.51)
    rows = new_quantized(x.shape[0], x.shape[1], torch.int8, x.device)
    again, kept = gated_residual_layer_norm_modulate_quantized(
        x, y, gate, shift, scale, tiles, torch.int8, out=(copy.fill_(0), rows)
    )
    assert again is copy
    assert torch.equal(again, expected_total)
    assert kept[0] is rows[0]
    assert torch.equal(kept[0], values)
    assert torch.equal(kept[1], scales)
    values, scales = layer_norm_modulate_quantized(x, shift, scale, tiles, torch.int8)
    kept = layer_norm_modulate_quantized(x, shift, scale, tiles, torch.int8, out=rows)
    assert kept[1] is rows[1]
    assert torch.equal(kept[0], values)
    assert torch.equal(kept[1], scales)
    expected = layer_norm_modulate(x, shift, scale, tiles)
    torch.testing.assert_close(values.float() * scales[:, None], expected, rtol=0, atol=float(scales.max()) * 0.51)


def test_gradients_flow() -> None:
    given = operands(64, ("cpu", torch.float32))
    x, y, gate, shift, scale, tiles = (v.clone().requires_grad_() if v.is_floating_point() else v for v in given.values())
    total, out = gated_residual_layer_norm_modulate(x, y, gate, shift, scale, tiles)
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
        layer_norm_modulate_quantized(x, shift, scale, tiles, torch.float16)
    with pytest.raises(ValueError, match="out must be"):
        layer_norm_modulate(x, shift, scale, tiles, out=torch.empty(3, 64))
    with pytest.raises(ValueError, match="y must be"):
        gated_residual(x, given["y"][:16], given["gate"], tiles)
