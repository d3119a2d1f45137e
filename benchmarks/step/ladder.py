"""One rung per optimisation, from computing a step the authors' way to the engine's.

    python -m benchmarks.step.ladder --workload full            28 steps of the full-size transformer, on a GPU
    python -m benchmarks.step.ladder --workload small           the small step of the issues, on a CPU
    python -m benchmarks.step.ladder --workload tiny            a smoke test

Weights are random and made on the device. Every rung's velocity is first compared with the first rung's: a rung that computes
something else is not timed. Rungs are timed in turn. Encoding and decoding are measured apart (`--stages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import Clock, count_allocations, summarise, time_once, write_record
from benchmarks.turns import Product, Turns, is_steady
from benchmarks.workload import Workload, merge, random_inputs, random_lora, random_transformer
from uso_engine.model.roofline import GPUS, Tokens, floor_ms, step_flops
from uso_engine.verification.measure import relative_error
from uso_kernels.attention import BACKENDS, available_backends

from .authors_way import AuthorsWay
from .encode_decode import time_stages
from .engine_way import Evaluate, engine_step

# Relative difference of a rung's velocity from the first rung's: rounding of the type, and LoRA rounded into the weights.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def rungs(workload: Workload, device: torch.device, dtype: torch.dtype) -> dict[str, Evaluate]:
    """The ladder, in order; names say what each adds to the one before."""
    transformer = random_transformer(workload.params, device, dtype)
    lora = random_lora(transformer, workload.lora_rank)
    inputs = random_inputs(workload, device, dtype)
    merged = random_transformer(workload.params, device, dtype)
    merge(merged, lora)
    length, times = inputs.grid[0] * inputs.grid[1], (0.75,)
    generator = torch.Generator("cpu").manual_seed(3)
    latents = torch.randn(length, workload.params.in_channels, generator=generator).to(device, dtype)

    authors = AuthorsWay(transformer, inputs, lora=lora)
    merged_authors = AuthorsWay(merged, inputs)
    hoisted = AuthorsWay(merged, inputs, hoist=True, times=times)
    ladder: dict[str, Evaluate] = {
        "authors' way": lambda: authors.velocity(latents, times[0]),
        "+ LoRA merged": lambda: merged_authors.velocity(latents, times[0]),
        "+ fixed work hoisted": lambda: hoisted.velocity(latents, times[0]),
        "+ packed batch, fused kernels, last block's surviving rows": engine_step(merged, inputs, latents, times, "dense"),
        "+ attention chosen (auto)": engine_step(merged, inputs, latents, times, "auto"),
    }
    for name, reason in available_backends(device).items():
        if BACKENDS[name].loss:
            continue  # Another result, which is not a rung: `benchmarks/gpu/variants.py` times it.
        if reason is None and name not in ("dense", "dense_batched") and not (name == "triton" and device.type == "cpu"):
            ladder[f"engine, attention {name}"] = engine_step(merged, inputs, latents, times, name)
    return ladder


def check(ladder: dict[str, Evaluate], dtype: torch.dtype) -> dict[str, float]:
    """Relative difference of every rung from the first.

    Raises:
        SystemExit: one computes something else.
    """
    first, *others = ladder
    truth = ladder[first]()
    differences = {name: relative_error(ladder[name](), truth) for name in others}
    wrong = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE[dtype]}
    if wrong:
        raise SystemExit(f"these rungs do not compute the first one's velocity: {wrong}")
    return {first: 0.0, **differences}


@torch.no_grad()
def run(
    workload: Workload, device: torch.device, dtype: torch.dtype, rounds: int, out: Path | None, clock: Clock = "wall"
) -> list[dict[str, object]]:
    """Check, time, print and record every rung."""
    ladder = rungs(workload, device, dtype)
    differences = check(ladder, dtype)
    steps = {name: partial(time_once, evaluate, device, clock) for name, evaluate in ladder.items()}
    timings = Turns(steps, Product(device, dtype, clock).time).take(rounds)
    times = {name: summarise(found) for name, found in timings.found.items()}
    tokens = Tokens(
        workload.text, workload.style, workload.grid[0] * workload.grid[1], workload.content[0] * workload.content[1]
    )
    flops = step_flops(workload.params, tokens)
    first = next(iter(times.values()))["median_ms"]
    records: list[dict[str, object]] = []
    for name, timing in times.items():
        record: dict[str, object] = {
            "workload": workload.name,
            "rung": name,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens.all,
            "rounds": rounds,
            "clock": clock,
            **timing,
            "product_ms": timings.product_ms,
            "steps_left_out": timings.left_out,
            "speedup": first / timing["median_ms"],
            "tflops": flops / timing["median_ms"] / 1e9,
            "difference": differences[name],
            **count_allocations(ladder[name], device),
        }
        if device.type == "cuda":
            record["floors_ms"] = {gpu: floor_ms(workload.params, tokens, GPUS[gpu])["floor"] for gpu in GPUS}
            record["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        records.append(record)
        write_record("ladder", record, out)
        print(f"{timing['median_ms']:9.1f} ms {record['speedup']:5.2f}x {record['allocations']:5.0f} allocations  {name}")
    if not is_steady(records[0]):
        print("tables leave this out: the machine did not keep its rate")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "workload", "device", "dtype", "rounds", "clock", "threads", "out", workload="small")
    parser.add_argument("--stages", action="store_true", help="also time encoding, the whole denoising and decoding")
    options = parser.read(arguments)
    run(options.workload, options.device, options.dtype, options.rounds, options.out, options.clock)
    if options.stages:
        for record in time_stages(options.workload, options.device, options.dtype):
            write_record("stage", record, options.out)
            print(record)


if __name__ == "__main__":
    main()
