"""Quantised layers: the error of one product at the real model's width, slices, hard values, and the crash they avoid."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from uso_engine.errors import BackendError
from uso_engine.model.linear import Linear
from uso_engine.precision.fp8_linear import Fp8Linear, Fp8WeightLinear
from uso_engine.precision.int4_linear import Int4Linear, group_size
from uso_engine.precision.int8_linear import Int8Linear, Int8WeightLinear
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.verification.measure import relative_error
from uso_kernels.matmul.product import Product
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.rows import QuantizedRows

WIDTH = 3072
ALL = (Fp8Linear, Fp8WeightLinear, Int8Linear, Int8WeightLinear, Int4Linear)


def layer_of(kind: type[QuantizedLinear], weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, device="meta")
    tensors = kind.quantize_weight(weight)
    layer.assign(tensors if bias is None else {**tensors, "bias": bias.to(dtype)})
    return layer


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (Fp8Linear, 0.035, 0.04),
        (Fp8WeightLinear, 0.024, 0.03),
        (Int8WeightLinear, 0.008, 0.012),
        (Int4Linear, 0.09, 0.11),
        # Activations in int8 too: over the 1.2 % that the int8 tier promises, so not what it does by default.
        (Int8Linear, 0.011, 0.014),
    ],
)
def test_error_of_one_product_at_the_models_width(
    kind: type[QuantizedLinear], least: float, most: float, dtype: torch.dtype
) -> None:
    """Against float64 with unrounded weights. Far less error than expected is as wrong as more: nothing was quantised."""
    weight, x, bias = drawn(WIDTH // 4, WIDTH) / WIDTH**0.5, drawn(64, WIDTH, 1), drawn(1, WIDTH // 4, 2)[0]
    y = layer_of(kind, weight, bias, dtype)(x.to(dtype))
    truth = x.double() @ weight.double().t() + bias.double()
    assert y.dtype == dtype
    # The bias is exact; the bound is on the product.
    assert least < relative_error(y - bias.to(dtype), truth - bias.double()) < most


@pytest.mark.parametrize("kind", ALL)
def test_layer_multiplies_by_what_it_says_its_weight_is(kind: type[QuantizedLinear]) -> None:
    weight, x = drawn(96, 256), drawn(32, 256, 1)
    layer = layer_of(kind, weight, None, torch.float32)
    exact = x
    if layer.takes is not None:
        values, scale = quantize_rows(x, layer.takes)
        exact = values.float() * scale[:, None]
    truth = exact.double() @ layer.dequantized_weight().double().t()
    assert relative_error(layer(x), truth) < (2e-3 if kind is Fp8WeightLinear else 1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_outputs_are_columns_of_the_whole(kind: type[QuantizedLinear]) -> None:
    layer = layer_of(kind, drawn(160, 256), drawn(1, 160, 1)[0], torch.float32)
    x = drawn(48, 256, 2)
    whole = layer(x)
    for outputs in (slice(0, 96), slice(96, None)):
        assert relative_error(layer(x, outputs=outputs), whole[:, outputs]) < 1e-6
    assert relative_error(layer(x.view(3, 16, 256)), whole.view(3, 16, 160)) < 1e-6


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_rows_quantised_by_a_kernel_are_taken_as_they_are(kind: type[QuantizedLinear]) -> None:
    layer = layer_of(kind, drawn(96, 256), drawn(1, 96, 1)[0], torch.bfloat16)
    x = drawn(32, 256, 2).bfloat16()
    assert layer.takes is not None
    rows = QuantizedRows(*quantize_rows(x, layer.takes))
    assert torch.equal(layer(rows), layer(x))
    with pytest.raises(TypeError, match="takes activations as floats, got rows of"):
        layer_of(Int4Linear, drawn(96, 256), None, torch.bfloat16)(rows)
    plain, weight = Linear(256, 96), drawn(96, 256)
    product = Product(weight, None, None)
    for multiply in (plain, plain.activated, product, product.activated):
        with pytest.raises(TypeError, match="takes activations as floats, got rows of"):
            multiply(rows)


@pytest.mark.parametrize("kind", ALL)
def test_zero_rows_constant_rows_and_outliers(kind: type[QuantizedLinear]) -> None:
    weight = drawn(16, 256) * 0.02
    weight[0] = 0
    weight[1] = 0.25
    weight[2] = -3e-6
    weight[3, 17] = 40.0
    layer = layer_of(kind, weight, None, torch.float32)
    restored = layer.dequantized_weight()
    assert bool(torch.isfinite(restored).all())
    assert not restored[0].any()
    # A row of one value is exact up to the type of its scale, however small the value.
    assert torch.allclose(restored[1], weight[1], rtol=1e-3)
    assert torch.allclose(restored[2], weight[2], rtol=2e-2)
    assert float(restored[3, 17]) == pytest.approx(40.0, rel=2e-3)
    assert bool(torch.isfinite(layer(torch.zeros(16, 256))).all())
    # A scale of zero would make the value 0 / 0, and what int8 makes of that is the processor's choice.
    assert bool((layer.get_buffer("scale") > 0).all())


def test_broken_activations_are_not_healed() -> None:
    x = drawn(16, 256)
    x[3, 5] = float("nan")
    for kind in ALL:
        y = layer_of(kind, drawn(32, 256), None, torch.float32)(x)
        assert bool(y[3].isnan().all())
        assert bool(y[4].isfinite().all())


def test_groups_follow_the_width() -> None:
    assert [group_size(width) for width in (3072, 15360, 192, 96, 48)] == [128, 128, 64, 32, 16]
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        group_size(100)
    with pytest.raises(ValueError, match="must stay under"):
        Int4Linear.quantize_weight(torch.full((16, 128), 40_000.0))


def test_assigning_lists_everything_that_does_not_fit() -> None:
    layer = Fp8Linear(64, 32, device="meta")
    with pytest.raises(ValueError, match=r"scale is missing; bias is missing; shift is left over; values must be") as caught:
        layer.assign({"values": torch.zeros(32, 64), "shift": torch.zeros(1)})
    assert "float8_e4m3fn" in str(caught.value)


def test_values_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are quantised some rows at a time; where the cuts fall must not matter."""
    weight = drawn(33, 256)
    whole = {kind: kind.quantize_weight(weight) for kind in (Int8WeightLinear, Int4Linear)}
    monkeypatch.setattr("uso_engine.precision.quanto_values._CHUNK_ELEMENTS", 256 * 4)
    for kind, expected in whole.items():
        for name, tensor in kind.quantize_weight(weight).items():
            assert torch.equal(tensor, expected[name]), (kind, name)


def test_without_quanto_the_error_says_what_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    for kind in (Int8Linear, Int4Linear):
        with pytest.raises(BackendError, match=r"uso-engine\[quant\].*fp8, bf16"):
            kind.quantize_weight(drawn(16, 128))
    Fp8Linear.quantize_weight(drawn(16, 128))


CRASH = """
import sys, torch
from uso_engine.precision.int8_linear import Int8Linear, Int8WeightLinear
def at_an_odd_address(tensor):
    memory = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    offset = 3 - memory.data_ptr() % 16 + 16
    moved = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    assert moved.data_ptr() % 16 == 3
    return moved.copy_(tensor)
x = torch.randn(48, 256).bfloat16()
for kind in (Int8WeightLinear, Int8Linear):
    tensors = kind.quantize_weight(torch.randn(96, 256))
    results = []
    for values in (tensors["values"], at_an_odd_address(tensors["values"])):
        layer = kind(256, 96, bias=False, device="meta")
        layer.assign({**tensors, "values": values})
        with torch.inference_mode():
            results.append(layer(x))
    assert torch.equal(*results)
print("alive")
"""


def test_int8_values_at_an_odd_address_do_not_crash_the_process(repository: Path) -> None:
    """optimum-quanto's own int8 layer segfaults on a CPU with bf16 activations when its values come mapped from a file."""
    environment = {"PYTHONPATH": f"{repository}:{repository / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", CRASH], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


class OnGPU(Tensor):
    """A CPU's tensor in the part of a GPU's."""

    is_cuda = True


@pytest.mark.parametrize(("generation", "writes"), [("ampere", False), ("ampere_consumer", False), ("ada", True)])
def test_a_gpu_whose_kernels_write_no_8_bit_floats_keeps_weights_in_them(
    generation: str, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5's, say: Triton compiles nothing that writes them there, and refused when the engine was nearly loaded."""
    weight, launched = drawn(64, 32), []

    def launch(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
        launched.append(generation)
        return quantize_rows(x.as_subclass(Tensor), dtype)

    monkeypatch.setattr("uso_engine.precision.fp8_linear.generation_of", lambda x: generation)
    monkeypatch.setattr("uso_engine.precision.fp8_linear.quantize_rows", launch)
    found, expected = Fp8WeightLinear.quantize_weight(weight.as_subclass(OnGPU)), Fp8WeightLinear.quantize_weight(weight)
    for name in ("values", "scale"):
        assert torch.equal(found[name].as_subclass(Tensor).float(), expected[name].float())
    assert launched == [generation] * (2 if writes else 1)
