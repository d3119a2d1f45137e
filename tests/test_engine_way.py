"""The steps that benchmarks time are the engine's."""

import torch
from repeated_capture import Repeating

from benchmarks.step.engine_way import captured_step, engine_step
from benchmarks.workload import WORKLOADS, random_inputs, random_transformer

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_captured_step_of_the_benchmarks_is_the_step() -> None:
    """What `benchmarks/gpu/second.sh` times as a CUDA graph."""
    workload = WORKLOADS["tiny"]
    transformer = random_transformer(workload.params, CPU, torch.float32)
    inputs = random_inputs(workload, CPU, torch.float32)
    latents = torch.randn(workload.grid[0] * workload.grid[1], workload.params.in_channels)
    capturing = Repeating()
    step = captured_step(transformer, inputs, latents, (0.5,), "auto", capturing)
    results = [step() for _ in range(2)]
    expected = engine_step(transformer, inputs, latents, (0.5,), "auto")()
    assert all(torch.equal(result, expected) for result in results)
    assert capturing.captured[0].count == 3
