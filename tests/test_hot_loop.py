"""What a step may not do: overwrite what a caller keeps, keep more alive than the documents say, ask the device or its driver,
lose gradients.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step.roofline import memory_bytes
from uso_engine.model.packing import PackedBatch
from uso_engine.model.roofline import Tokens
from uso_engine.model.run import Fusion
from uso_engine.model.transformer import Transformer
from uso_engine.precision.fp8_linear import Fp8Linear, Fp8WeightLinear
from uso_engine.precision.int4_linear import Int4Linear
from uso_engine.precision.int8_linear import Int8Linear, Int8WeightLinear
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.step import Step
from uso_engine.verification.measure import relative_error
from uso_kernels.attention import BackendUnavailable
from uso_kernels.matmul.linear import linear
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


@torch.no_grad()
def test_what_a_caller_keeps_is_not_overwritten() -> None:
    """Velocities, latents' estimates and an observer's tensors stay what they were through the steps that follow."""
    denoiser = guided(small_transformer())
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, tensor: Tensor, layout: Ragged) -> None:
        kept[name] = (tensor, tensor.clone())

    for index in range(denoiser.steps):
        report = denoiser.step(observe if index == 0 else None)
        for name, tensor in (("velocity", report.velocities[0]), ("estimate", report.estimated_clean(0))):
            kept[f"{name} of step {index}"] = (tensor, tensor.clone())
    assert len(kept) == 2 * SMALL.depth + SMALL.depth_single_blocks + 1 + 2 * denoiser.steps
    for name, (tensor, copy) in kept.items():
        assert torch.equal(tensor, copy), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_changes_nothing_that_it_reads(dtype: torch.dtype) -> None:
    transformer, batch, latents, modulation = formed(dtype)
    given = (batch.text_tokens, batch.content_tokens, batch.cos, batch.sin, latents, modulation)
    before = [tensor.clone() for tensor in given]
    first, again = transformer(batch, latents, modulation), transformer(batch, latents, modulation)
    assert torch.equal(first, again)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@torch.no_grad()
def test_attention_backends_agree_through_the_model(backend: str) -> None:
    transformer, batch, latents, modulation = formed()
    expected = transformer(batch, latents, modulation)
    transformer.attention_backend = backend
    assert transformer.attention_backends(batch) == (backend,)
    result = transformer(batch, latents, modulation)
    assert relative_error(result, expected) < 2e-6


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
    transformer(batch, latents, modulation).square().mean().backward()
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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_allowing_to_record_changes_no_bits_and_recording_no_more_than_rounding(dtype: torch.dtype, bound: float) -> None:
    """Where autograd may record and nobody asks for a gradient, the velocity has the bits that it has where it may not."""
    exact, batch, latents, modulation = formed(torch.float64)
    truth = exact(batch, latents, modulation)
    transformer, batch, latents, modulation = formed(dtype)
    with torch.no_grad():
        expected = transformer(batch, latents, modulation)
    assert torch.equal(transformer(batch, latents, modulation), expected)
    recorded = transformer(batch, latents.clone().requires_grad_(), modulation)
    assert recorded.requires_grad
    assert relative_error(recorded.detach(), truth) < min(bound, 1.5 * relative_error(expected, truth))


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


def guided(transformer: Transformer) -> DenoisingRun:
    """A run of one image with padding rows and a negative prompt."""
    sequence = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=1, text=10))
    negative = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=2, text=12))
    return DenoisingRun(transformer, [ImageJob(sequence, draw_noise(80, 48, 1), SIGMAS, negative, 2.0)])


def aligned(transformer: Transformer) -> DenoisingRun:
    """A run of one image without padding rows: streams are views of the joint order."""
    sequence = drawn_sequence(transformer, (4, 4), drawn_conditions(SMALL, seed=3, text=32, contents=((8, 8),)))
    return DenoisingRun(transformer, [ImageJob(sequence, draw_noise(64, 64, 1), SIGMAS)])


def test_a_step_asks_the_device_nothing() -> None:
    denoiser = guided(small_transformer())
    denoiser.step()
    with Synchronisations() as mode:
        denoiser.step()
    assert mode.found == []
    assert denoiser.attention_backends == ("dense",)
    with Synchronisations() as mode:
        torch.ones(2).sum().item()
    assert mode.found == ["_local_scalar_dense"]


KINDS = [None, Fp8Linear, Fp8WeightLinear, Int8Linear, Int8WeightLinear, Int4Linear]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "float")
@torch.no_grad()
def test_a_step_keeps_no_more_alive_than_the_documents_say(
    kind: type[QuantizedLinear] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activations of docs/performance.md, with dense attention, which makes a result of its own before it is written, and
    products that take bfloat16 as it is, as a GPU's do.
    """
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: True)
    transformer = small_transformer(dtype=torch.bfloat16)
    batch = PackedBatch.form([drawn_sequence(transformer, (32, 32), drawn_conditions(SMALL, seed=1, text=64))])
    if kind is not None:
        quantise(transformer, kind)
    transformer.attention_backend = "dense"
    latents = torch.zeros(batch.output.rows, SMALL.in_channels, dtype=torch.bfloat16)
    modulation = torch.zeros(1, transformer.modulation_vectors, SMALL.hidden_size, dtype=torch.bfloat16)
    with LiveBytes() as counted:
        transformer(batch, latents, modulation)
    rows, is_eight_bits = batch.joint.rows, kind in (Fp8Linear, Int8Linear)
    formula = memory_bytes(SMALL, Tokens(text=64, image=1024), reads_floats=not is_eight_bits)["activations"]
    # Attention's sums for each row and head come on top, in float32, in 8-bit tiers row scales, in others a weight as floats.
    most = formula + 4 * rows * SMALL.num_heads + (8 * 4 * rows if is_eight_bits else 0)
    if kind is not None and not is_eight_bits:
        most += 2 * SMALL.hidden_size * (SMALL.hidden_size + SMALL.mlp_width)
    assert 0.98 * formula < counted.peak <= most


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "float")
@torch.no_grad()
def test_no_step_after_the_first_asks_the_driver_for_memory(kind: type[QuantizedLinear] | None) -> None:
    """The caching allocator hands the first step's memory out again, however many tensors a step makes."""
    transformer = small_transformer(dtype=torch.bfloat16)
    if kind is not None:
        quantise(transformer, kind)
    transformer.to("cuda")
    conditions = [drawn_conditions(SMALL, seed=seed, text=100 * seed, contents=((32, 32),)) for seed in (1, 2)]
    sequence, negative = (drawn_sequence(transformer, (32, 32), entry) for entry in conditions)
    denoiser = DenoisingRun(transformer, [ImageJob(sequence, draw_noise(512, 512, 1), SIGMAS, negative, 2.0)])
    denoiser.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    while denoiser.index < denoiser.steps:
        denoiser.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before


@torch.no_grad()
def test_runs_of_one_transformer_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins and ends between another's dequantised weight and its product changes neither."""
    transformer = small_transformer(dtype=torch.bfloat16)
    quantise(transformer, Int4Linear)
    expected = [run(transformer).step().velocities[0] for run in (guided, aligned)]
    outer, inner = guided(transformer), aligned(transformer)
    reports: list[Step] = []

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        monkeypatch.setattr("uso_engine.precision.quantized_linear.linear", linear)
        reports.append(inner.step())
        return linear(*args, **kwargs)

    monkeypatch.setattr("uso_engine.precision.quantized_linear.linear", interrupted)
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
    fused = transformer(batch, latents, modulation)
    # The last single block's first matrix takes floats, twice: it picks rows.
    assert calls == {"rows": len(layers) - 1, "floats": 2}
    for layer in layers:
        layer.takes = None
    transformer.fusion = Fusion(gelu=False, parts=False)
    separate = transformer(batch, latents, modulation)
    assert relative_error(fused, separate) < 5e-3
    assert relative_error(fused, plain) > 5e-3


@pytest.mark.parametrize("off", ["gelu", "parts", "values"])
@torch.no_grad()
def test_what_is_fused_changes_no_more_than_rounding(off: str) -> None:
    """Each fusion alone switched off, on a padded batch and on one in joint order; the default is at most 5 % farther off."""
    for make in (formed, in_order):
        exact, batch, latents, modulation = make(torch.float64)
        exact.fusion = Fusion(gelu=False, parts=False, values=False)
        truth = exact(batch, latents, modulation)
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            transformer, batch, latents, modulation = make(dtype)
            fused = relative_error(transformer(batch, latents, modulation), truth)
            transformer.fusion = Fusion(**{off: False})
            apart = relative_error(transformer(batch, latents, modulation), truth)
            assert fused < bound and fused < 1.05 * apart + 1e-7


def in_order(dtype: torch.dtype) -> tuple[Transformer, PackedBatch, Tensor, Tensor]:
    """A transformer and a batch of one sequence without padding rows."""
    transformer = small_transformer(dtype=dtype)
    sequence = drawn_sequence(transformer, (4, 8), drawn_conditions(SMALL, seed=1, text=28, style=4))
    batch = PackedBatch.form([sequence])
    assert batch.is_in_order
    latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return transformer, batch, latents, sequence.modulation[:1]
