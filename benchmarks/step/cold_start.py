"""The first step of a cold process, and the peak memory of denoising against the documented formula.

    TRITON_CACHE_DIR=$(mktemp -d) python -m benchmarks.step.cold_start --workload full

Compiles what a first request compiles: run it with an empty Triton cache. Weights are random; making them is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import write_record
from benchmarks.workload import Workload, conditions, random_inputs, random_transformer
from uso_engine.model.roofline import Tokens
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule

from .roofline import memory_bytes


@torch.no_grad()
def run(workload: Workload, device: torch.device, dtype: torch.dtype, out: Path | None) -> dict[str, object]:
    """Take the steps of one image, time the first and the second apart, and record them with the peak memory."""
    transformer = random_transformer(workload.params, device, dtype)
    inputs = random_inputs(workload, device, dtype)
    rows, columns = workload.grid
    sigmas = schedule(workload.steps, 16 * columns, 16 * rows)
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        if not seconds:
            sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
            denoiser = DenoisingRun(transformer, [ImageJob(sequence, torch.randn(16, 2 * rows, 2 * columns), tuple(sigmas))])
        denoiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    tokens = Tokens(workload.text, workload.style, math.prod(workload.grid), math.prod(workload.content))
    formula = memory_bytes(workload.params, tokens, steps=workload.steps, tier=TIER_OF_DTYPE[dtype])
    record: dict[str, object] = {
        "workload": workload.name,
        "device": device.type,
        "tokens": tokens.all,
        "first_step_s": seconds[0],
        "second_step_s": seconds[1],
        "attention": denoiser.attention_backends,
        "formula_gib": sum(formula.values()) / 2**30,
    }
    if device.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    write_record("cold_start", record, out)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "workload", "device", "out")
    options = parser.read(arguments)
    print(run(options.workload, options.device, torch.bfloat16, options.out))


if __name__ == "__main__":
    main()
