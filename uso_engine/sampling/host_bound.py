"""Whether a step keeps the host busier than the GPU, by what both are predicted to take.

Predicted from sizes alone, so that the same request is computed the same way every time. The rates are about 0.65 of the data
sheets' dense bf16 tensor cores with float32 sums, what products and attention of these shapes are published to reach; the time
of the host is about what `benchmarks/step/host_stub.py` measures and a driver's calls. None was measured on a GPU yet
(docs/performance.md).
"""

from __future__ import annotations

from uso_engine.model.params import TransformerParams

HOST_MS_PER_BLOCK = 0.25
"""One block of one sequence, everything that is queued for it."""
HOST_MS_PER_FURTHER_SEQUENCE = 0.12
"""Each sequence more: its products and its attention are calls of their own."""
FASTER_IN_8_BITS = 1.6

_TFLOPS = {(8, 0): 200.0, (8, 6): 45.0, (8, 7): 45.0, (8, 9): 105.0, (9, 0): 620.0, (10, 0): 1400.0, (12, 0): 135.0}
"""By the lowest compute capability that they hold for."""


def gpu_ms(flops: float, capability: tuple[int, int], *, eight_bits: bool = False) -> float:
    """Predicted milliseconds of a step on a GPU of a compute capability."""
    known = [entry for entry in _TFLOPS if entry <= capability]
    rate = _TFLOPS[max(known)] if known else min(_TFLOPS.values())
    return flops / (1e9 * rate * (FASTER_IN_8_BITS if eight_bits else 1.0))


def host_ms(params: TransformerParams, sequences: int) -> float:
    """Predicted milliseconds that queueing a step takes the host."""
    per_block = HOST_MS_PER_BLOCK + HOST_MS_PER_FURTHER_SEQUENCE * (sequences - 1)
    return (params.depth + params.depth_single_blocks) * per_block
