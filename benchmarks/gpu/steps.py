"""One step at full size: ours by attention backend and diffusers' own, eager and compiled, in turn in one process.

Every variant's velocity is compared with eager diffusers' before it is timed; one that computes something else is not, and the
part fails. Then 28 steps back to back, which is how long a card's clock has to hold.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.measure import count_allocations, output_hash
from benchmarks.step.against_diffusers import TIME, TOLERANCE, diffusers_step, diffusers_twin
from benchmarks.step.engine_way import Evaluate, engine_step
from benchmarks.workload import Inputs, conditions
from uso_engine.model.roofline import step_flops
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule
from uso_engine.verification.measure import relative_error
from uso_kernels.attention import BACKENDS

from .bench import Bench

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

EAGER, COMPILED, OURS = "diffusers", "diffusers compiled", "ours, auto"


def run(bench: Bench) -> None:
    transformer, inputs, latents = bench.model()
    twin = diffusers_twin(transformer)
    variants: dict[str, Evaluate] = {
        EAGER: diffusers_step(twin, inputs, latents),
        OURS: engine_step(transformer, inputs, latents, (TIME,), "auto"),
    }
    for name, reason in bench.backends().items():
        if reason is None and name != "dense_batched" and not BACKENDS[name].loss:  # A lossy one is among the variants.
            variants[f"ours, {name}"] = engine_step(transformer, inputs, latents, (TIME,), name)
    truth = variants[EAGER]()
    outputs: dict[str, object] = {}
    bench.attempt("ms", lambda: timed(bench, variants, truth, outputs))
    bench.save("outputs", outputs)
    many = f"{bench.workload.steps} steps back to back, ms each"
    bench.attempt(f"ours, {many}", lambda: back_to_back(bench, transformer, inputs))
    compiled = diffusers_step(compiled_twin(twin), inputs, latents)
    both = {EAGER: variants[EAGER], COMPILED: compiled, OURS: variants[OURS]}
    bench.attempt("ms, beside compiled", lambda: timed(bench, both, truth, outputs))
    bench.save("outputs", outputs)
    bench.attempt(f"diffusers compiled, {many}", lambda: repeated(bench, compiled))


def timed(
    bench: Bench, variants: dict[str, Evaluate], truth: Tensor, outputs: dict[str, object]
) -> dict[str, dict[str, float]]:
    """Check every variant, time those that are right in turn, and record them."""
    right = {}
    for name, evaluate in variants.items():
        outputs[name] = bench.tried(lambda evaluate=evaluate: described(bench, evaluate, truth))  # type: ignore[misc]
        if isinstance(outputs[name], dict):
            right[name] = evaluate
    times = bench.in_turn(right)
    flops = step_flops(bench.workload.params, bench.tokens)
    for name, timing in times.items():
        found = outputs[name]
        assert isinstance(found, dict)
        tflops = flops / timing["median_ms"] / 1e9
        bench.record("gpu_step", {"variant": name, "tokens": bench.tokens.all, **timing, "tflops": tflops, **found})
    if OURS in times and EAGER in times:
        bench.record("step", step_record(bench, variants, times, flops, outputs[OURS]))
    return times


def described(bench: Bench, evaluate: Evaluate, truth: Tensor) -> dict[str, object]:
    """Hash and difference of a variant's velocity, and the seconds of its first call.

    Raises:
        ValueError: it computes something else.
    """
    start = time.perf_counter()
    result = evaluate()
    bench.synchronize()
    seconds = time.perf_counter() - start
    difference = relative_error(result, truth)
    if not difference <= TOLERANCE[bench.dtype]:
        raise ValueError(f"another velocity than diffusers': relative difference {difference:.3g}")
    return {"difference": difference, "hash": output_hash(result), "first_call_s": seconds}


def step_record(
    bench: Bench, variants: dict[str, Evaluate], times: dict[str, dict[str, float]], flops: float, found: object
) -> dict[str, object]:
    """The record that `benchmarks.step.against_diffusers` makes."""
    assert isinstance(found, dict)
    return {
        "dtype": "bfloat16",
        "tokens": bench.tokens.all,
        "rounds": bench.rounds,
        "clock": "wall",
        "difference": found["difference"],
        "ours_ms": times[OURS],
        "diffusers_ms": times[EAGER],
        "ratio": times[EAGER]["median_ms"] / times[OURS]["median_ms"],
        "flops": flops,
        "ours_allocations": count_allocations(variants[OURS], bench.device),
        "diffusers_allocations": count_allocations(variants[EAGER], bench.device),
    }


def compiled_twin(twin: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A second module of the same weights, in the same memory, whose repeated blocks are compiled."""
    with torch.device("meta"):
        copy = type(twin).from_config(twin.config)
    copy.load_state_dict(twin.state_dict(), assign=True)
    # On a CPU, which rehearses, the blocks are traced and not compiled: that takes a C++ compiler and minutes.
    backend = "inductor" if next(twin.parameters()).is_cuda else "eager"
    copy.eval().requires_grad_(False).compile_repeated_blocks(fullgraph=True, backend=backend)
    return copy


def back_to_back(bench: Bench, transformer: Transformer, inputs: Inputs) -> float:
    """Milliseconds of a step when the engine's own loop takes all of them."""
    rows, columns = inputs.grid
    sigmas = schedule(bench.workload.steps, 16 * columns, 16 * rows)
    sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
    transformer.attention_backend = "auto"
    denoiser = DenoisingRun(transformer, [ImageJob(sequence, torch.randn(16, 2 * rows, 2 * columns), tuple(sigmas))])
    return 1e3 * bench.seconds(denoiser.run) / denoiser.steps


def repeated(bench: Bench, evaluate: Evaluate) -> float:
    """Milliseconds of a step when as many of them are queued at once."""
    count = bench.workload.steps
    return 1e3 * bench.seconds(lambda: [evaluate() for _ in range(count)]) / count
