"""What a step may not do: answer otherwise with kept buffers, overwrite what a caller keeps, make tensors, ask the device,
lose gradients.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uso_engine.model.packing import PackedBatch
from uso_engine.model.transformer import Transformer
from uso_engine.model.workspace import Workspace
from uso_engine.quantization.fp8_linear import Fp8Linear, Fp8WeightLinear
from uso_engine.quantization.int4_linear import Int4Linear
from uso_engine.quantization.int8_linear import Int8Linear, Int8WeightLinear
from uso_engine.quantization.quantized_linear import QuantizedLinear
from uso_engine.sampling.denoiser import Denoiser, ImageJob, Step
from uso_engine.sampling.latents import draw_noise
from uso_kernels.attention import BackendUnavailable
from uso_kernels.linear import linear
from uso_kernels.ragged import Ragged


def formed(dtype: torch.dtype = torch.float32) -> tuple[Transformer, PackedBatch, Tensor, Tensor]:
    """A transformer and a batch of two sequences with padding rows."""
    transformer = small_transformer(dtype=dtype)
    sequences = [
        drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=1, text=10, style=4, contents=((4, 2),))),
        drawn_sequence(transformer, (4, 4), drawn_conditions(SMALL, seed=2, text=17)),
    ]
    batch = PackedBatch.form(sequences)
    latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return transformer, batch, latents, torch.stack([sequence.modulation[0] for sequence in sequences])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_kept_buffers_change_no_bit(dtype: torch.dtype) -> None:
    transformer, batch, latents, modulation = formed(dtype)
    text = batch.text_tokens.clone()
    expected = transformer(batch, latents, modulation)
    workspace = Workspace()
    first = transformer(batch, latents, modulation, workspace=workspace).clone()
    size = workspace.size_bytes
    transformer(batch, latents * 2, modulation, workspace=workspace)
    again = transformer(batch, latents, modulation, workspace=workspace)
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
    assert workspace.size_bytes == size > 0
    assert torch.equal(batch.text_tokens, text)


@torch.no_grad()
def test_what_an_observer_keeps_is_not_overwritten() -> None:
    transformer, batch, latents, modulation = formed()
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, tensor: Tensor, layout: Ragged) -> None:
        kept[name] = (tensor, tensor.clone())

    transformer(batch, latents, modulation, observe, Workspace())
    assert len(kept) == 2 * SMALL.depth + SMALL.depth_single_blocks + 1
    for name, (tensor, copy) in kept.items():
        assert torch.equal(tensor, copy), name


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@torch.no_grad()
def test_attention_backends_agree_through_the_model(backend: str) -> None:
    transformer, batch, latents, modulation = formed()
    expected = transformer(batch, latents, modulation)
    transformer.attention_backend = backend
    assert transformer.attention_backends(batch) == (backend,)
    result = transformer(batch, latents, modulation, workspace=Workspace())
    assert float((result - expected).norm() / expected.norm()) < 2e-6


@torch.no_grad()
def test_a_backend_that_cannot_run_is_an_error() -> None:
    transformer, batch, latents, modulation = formed()
    transformer.attention_backend = "xformers"
    with pytest.raises(BackendUnavailable, match="xformers"):
        transformer.attention_backends(batch)
    with pytest.raises(BackendUnavailable, match="xformers"):
        transformer(batch, latents, modulation)


def test_training_gets_gradients_of_every_weight_that_a_step_reads() -> None:
    transformer, batch, latents, modulation = formed()
    transformer.requires_grad_(True)
    modulation = modulation.clone().requires_grad_()
    transformer(batch, latents, modulation, workspace=Workspace()).square().mean().backward()
    assert modulation.grad is not None
    # Text projections of the last single block's MLP rows and everything made at admission have no part in a step.
    at_admission = ("time_in", "guidance_in", "vector_in", "txt_in", "_mod.", "modulation", "adaLN")
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in at_admission):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_gradients_are_those_of_finite_differences() -> None:
    transformer, batch, latents, modulation = formed()
    leaf = latents.clone().requires_grad_()
    weights = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(5))
    (transformer(batch, leaf, modulation) * weights).sum().backward()
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(6))
    assert leaf.grad is not None
    with torch.no_grad():
        ahead, behind = (transformer(batch, latents + step * direction, modulation) for step in (1e-2, -1e-2))
    expected = float(((ahead - behind).double() * weights).sum() / 2e-2)
    assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=2e-3)


class Synchronisations(TorchDispatchMode):
    """Counts operations that would make a host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_to_copy")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        # A copy is one if it changes the device.
        if name in self.WAITING and (name != "_to_copy" or (kwargs or {}).get("device") is not None):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def guided(transformer: Transformer) -> Denoiser:
    """A run of one image with padding rows and a negative prompt."""
    sequence = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=1, text=10))
    negative = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=2, text=12))
    return Denoiser(transformer, [ImageJob(sequence, draw_noise(80, 48, 1), SIGMAS, negative, 2.0)])


def aligned(transformer: Transformer) -> Denoiser:
    """A run of one image without padding rows: streams are views of the joint order."""
    sequence = drawn_sequence(transformer, (4, 4), drawn_conditions(SMALL, seed=3, text=32, contents=((8, 8),)))
    return Denoiser(transformer, [ImageJob(sequence, draw_noise(64, 64, 1), SIGMAS)])


def test_a_step_asks_the_device_nothing() -> None:
    denoiser = guided(small_transformer())
    denoiser.step()
    with Synchronisations() as mode:
        denoiser.step()
    assert mode.found == []
    assert denoiser.workspace_bytes > 0
    assert denoiser.attention_backends == ("dense",)
    with Synchronisations() as mode:
        torch.ones(2).sum().item()
    assert mode.found == ["_local_scalar_dense"]


class NewTensors(TorchDispatchMode):
    """Counts results that lie in memory of their own. What an operation allocates inside itself it does not see."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        self.found.update([function.overloadpacket.__name__] * len(made))
        return result


# Dense attention has no form that writes to memory of the caller's: its result and the logarithms of its sums.
DENSE = {torch.float32: {"_scaled_dot_product_flash_attention_for_cpu"}, torch.bfloat16: set()}
KINDS = [None, Fp8Linear, Fp8WeightLinear, Int8Linear, Int8WeightLinear, Int4Linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "float")
@pytest.mark.parametrize("start", [aligned, guided])
def test_a_step_after_the_first_makes_no_tensor(
    start: Callable[[Transformer], Denoiser], kind: type[QuantizedLinear] | None, dtype: torch.dtype
) -> None:
    transformer = small_transformer(dtype=dtype)
    if kind is not None:
        quantise(transformer, kind)
    denoiser = start(transformer)
    denoiser.step()
    size = denoiser.workspace_bytes
    with NewTensors() as mode:
        denoiser.step()
    assert set(mode.found) == DENSE[dtype]
    assert denoiser.workspace_bytes == size
    with NewTensors() as mode:
        (torch.ones(2) + 1).view(1, 2)
    assert mode.found == {"ones": 1, "add": 1}


@torch.no_grad()
def test_kept_buffers_are_no_larger_than_the_documents_say() -> None:
    """The activations of docs/performance.md: what is never alive at the same time shares its memory."""
    transformer, batch, latents, modulation = formed()
    workspace = Workspace()
    velocity = transformer(batch, latents, modulation, workspace=workspace)
    formula = 4 * batch.joint.rows * (13 * SMALL.hidden_size + 2 * SMALL.mlp_width)
    assert 0.9 * formula < workspace.size_bytes - velocity.nbytes <= formula


@torch.no_grad()
def test_runs_of_one_transformer_share_no_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins and ends between another's dequantised weight and its product changes neither."""
    transformer = small_transformer(dtype=torch.bfloat16)
    quantise(transformer, Int4Linear)
    expected = [run(transformer).step().velocities[0].clone() for run in (guided, aligned)]
    outer, inner = guided(transformer), aligned(transformer)
    reports: list[Step] = []

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        monkeypatch.setattr("uso_kernels.int4_matmul.linear", linear)
        reports.append(inner.step())
        return linear(*args, **kwargs)

    monkeypatch.setattr("uso_kernels.int4_matmul.linear", interrupted)
    assert torch.equal(outer.step().velocities[0], expected[0])
    assert torch.equal(reports[0].velocities[0], expected[1])


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
@torch.no_grad()
def test_kernels_that_end_in_eight_bits_give_what_a_separate_pass_gives(kind: type[QuantizedLinear]) -> None:
    """In float32 nothing is rounded in between, so the two agree but for values on the border between two numbers."""
    transformer, batch, latents, modulation = formed()
    plain = transformer(batch, latents, modulation)
    layers = quantise(transformer, kind)
    calls: Counter[str] = Counter()
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: calls.update(["floats" if isinstance(given[0], Tensor) else "rows"]))
    fused = transformer(batch, latents, modulation, workspace=Workspace())
    # The last single block's first matrix takes floats, twice: it picks rows.
    assert calls == {"rows": len(layers) - 1, "floats": 2}
    for layer in layers:
        layer.quantized_input = None
    separate = transformer(batch, latents, modulation)
    assert float((fused - separate).norm() / separate.norm()) < 5e-3
    assert float((fused - plain).norm() / plain.norm()) > 5e-3
