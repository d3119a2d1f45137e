"""Ways to compute the step against each other, in turn in one process: one line below for each.

The first is the base: every other's velocity is compared with its. What is faster becomes the default, what is not is deleted
and noted in `benchmarks/LOG.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import output_hash
from benchmarks.step.against_diffusers import TIME
from benchmarks.step.engine_way import Evaluate, captured_step, engine_step
from benchmarks.tiers.steps import formats_by_name, quantized_copy, with_8_bit_activations
from benchmarks.workload import Inputs, Workload
from uso_engine.model.run import Fusion
from uso_engine.model.side_stream import SideStream, why_no_side_stream
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.cuda_capture import CudaCapturing
from uso_engine.verification.measure import relative_error
from uso_kernels import operation
from uso_kernels.attention import BACKENDS

from .bench import Bench

Made = tuple[Transformer, Inputs, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute a step.

    Args:
        name: what reports call it.
        make: turns a model, a request and latents into the step.
        missing: why it cannot run where a part measures, or None.
        largest_difference: of its velocity from the base's, relative; what differs more is not timed.
    """

    name: str
    make: Callable[[Made, Workload], Evaluate]
    missing: Callable[[Bench], str | None] = lambda bench: None
    largest_difference: float = 3e-2


def by_attention(backend: str) -> Variant:
    """The step with an attention backend; the velocity is off by less than attention itself."""
    return Variant(
        f"attention {backend}",
        lambda made, workload: engine_step(*made, (TIME,), backend),
        lambda bench: bench.backends()[backend],
        largest_difference=3e-2 + BACKENDS[backend].loss,
    )


def without(name: str) -> Variant:
    """The step with one of its fusions switched off."""

    def make(made: Made, workload: Workload) -> Evaluate:
        transformer, inputs, latents = made
        copy = unfused_copy(transformer, Fusion(**{name: False}))
        return engine_step(copy, inputs, latents, (TIME,), "auto")

    return Variant(f"without fused {name}", make)


def unfused_copy(transformer: Transformer, fusion: Fusion) -> Transformer:
    """A second module of the same weights, in the same memory, that fuses other passes."""
    with torch.device("meta"):
        copy = Transformer(transformer.params, fusion=fusion)
    copy.load_state_dict(transformer.state_dict(), assign=True)
    return copy


def captured() -> Variant:
    """The step as a CUDA graph, whatever its size: `cuda_graphs = "on"`."""
    capturing = CudaCapturing()
    return Variant(
        "CUDA graph",
        lambda made, workload: captured_step(*made, (TIME,), "auto", capturing),
        lambda bench: capturing.missing(bench.device),
        largest_difference=0.0,
    )


BESIDE = "text beside image"


def beside(*, graph: bool = False) -> Variant:
    """The step with the text stream's work on a second stream, alone or in a CUDA graph; bits are the base's."""
    capturing = CudaCapturing()

    def make(made: Made, workload: Workload) -> Evaluate:
        transformer, inputs, latents = made
        copy = unfused_copy(transformer, transformer.fusion)
        copy.beside = SideStream(latents.device)
        step = (copy, inputs, latents, (TIME,), "auto")
        return captured_step(*step, capturing) if graph else engine_step(*step)

    def missing(bench: Bench) -> str | None:
        return why_no_side_stream(bench.device) or (capturing.missing(bench.device) if graph else None)

    return Variant(f"{BESIDE}, CUDA graph" if graph else BESIDE, make, missing, largest_difference=0.0)


def in_tier(name: str, attention: str = "auto") -> Variant:
    """The step of a quantised copy of the model."""

    def make(made: Made, workload: Workload) -> Evaluate:
        transformer, inputs, latents = made
        copy = quantized_copy(transformer, formats_by_name(workload.params, latents.device)[name])
        return engine_step(copy, inputs, latents, (TIME,), attention)

    def missing(bench: Bench) -> str | None:
        if name not in formats_by_name(bench.workload.params, bench.device):
            return "this GPU has no such tier"
        return None if attention == "auto" else bench.backends()[attention]

    suffix = "" if attention == "auto" else f", attention {attention}"
    return Variant(f"tier {name}{suffix}", make, missing, largest_difference=0.5)


def with_references(made: Made, workload: Workload) -> Evaluate:
    """The step with plain PyTorch in the place of every Triton kernel but attention's, which no step of this kind calls."""
    step = engine_step(*made, (TIME,), "dense")

    def evaluate() -> Tensor:
        with ExitStack() as stack:
            # No call goes straight to its launch, and no operator has a kernel: what is left is the reference.
            stack.enter_context(patch.object(operation, "NATIVE_DEVICE", "none"))
            for known in operation.OPERATIONS.values():
                stack.enter_context(known.op.set_kernel_enabled("cuda", enabled=False))
            return step()

    return evaluate


VARIANTS = (
    Variant("base", lambda made, workload: engine_step(*made, (TIME,), "auto")),
    by_attention("dense"),
    by_attention("varlen"),
    by_attention("triton"),
    by_attention("xformers"),
    by_attention("flash3"),
    by_attention("flash4"),
    by_attention("chunked"),
    by_attention("8bit"),
    captured(),
    beside(),
    beside(graph=True),
    *(without(field.name) for field in fields(Fusion)),
    Variant("kernels reference", with_references),
    *map(in_tier, with_8_bit_activations()),
    in_tier("fp8", "8bit"),
)


def run(bench: Bench) -> None:
    compare(bench, bench.workload, VARIANTS)


def compare(bench: Bench, workload: Workload, variants: tuple[Variant, ...]) -> None:
    """Check every variant against the first, time those that run, and record them."""
    made = bench.model(workload)
    truth = variants[0].make(made, workload)().clone()
    steps: dict[str, Evaluate] = {}
    outputs: dict[str, Any] = {}
    for variant in variants:
        outputs[variant.name] = variant.missing(bench) or bench.tried(
            lambda variant=variant: checked(variant, made, workload, steps, truth)  # type: ignore[misc]
        )
        bench.save("outputs", outputs)
    times = bench.in_turn(steps)
    bench.save("ms", times)
    base = times[variants[0].name]["median_ms"]
    bench.save("times as fast as the base", {name: base / timing["median_ms"] for name, timing in times.items()})
    tokens = replace(bench.tokens, image=math.prod(workload.grid), content=math.prod(workload.content)).all
    for name, timing in times.items():
        record = {"variant": name, "grid": list(workload.grid), "tokens": tokens}
        bench.record("gpu_variant", {**record, **timing, **outputs[name]})


def checked(variant: Variant, made: Made, workload: Workload, steps: dict[str, Evaluate], truth: Tensor) -> dict[str, object]:
    """Make a variant and describe what it computes.

    Raises:
        ValueError: that differs from the base by more than it may.
    """
    step = variant.make(made, workload)
    result = step()
    difference = relative_error(result, truth)
    if not difference <= variant.largest_difference:
        raise ValueError(f"differs from the base by {difference:.3g}, at most {variant.largest_difference:g} is rounding")
    steps[variant.name] = step
    return {"difference": difference, "hash": output_hash(result)}
