"""The first step of a cold process, and the peak memory of denoising against the documented formula.

    TRITON_CACHE_DIR=$(mktemp -d) python -m benchmarks.step.cold_start --workload full

Compiles what a first request compiles: run it with an empty Triton cache. Weights are random; making them is not counted.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from benchmarks.measure import write_record
from benchmarks.workload import WORKLOADS, Workload, conditions, random_inputs, random_transformer
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule

from .roofline import Tokens, memory_bytes


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="file of JSON lines; by default this machine's")
    options = parser.parse_args()
    print(run(WORKLOADS[options.workload], torch.device(options.device), torch.bfloat16, options.out))


if __name__ == "__main__":
    main()
