"""What a step on an H100 should take before anybody has measured one: the roofline's operations at the rates expected of each.

Rates are those that published measurements of such shapes reach (products of 5,000 rows and more, attention by cuDNN), and what
a streaming kernel keeps of the bandwidth. `benchmarks/gpu` measures; a class that is off by more than a tenth wants a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Operation, Tokens, step_operations
from uso_engine.profiling.kernel_classes import kernel_class

EXPECTED_RATES = (
    ("single linear1", 700e12),
    ("single linear2 attention", 640e12),
    ("single linear2", 670e12),
    ("sum of both", 2.4e12),
    ("double image", 684e12),
    ("double text", 433e12),
    ("attention", 600e12),
    ("q/k", 2.2e12),
    ("gated residual", 2.4e12),
    ("norm", 2.4e12),
    ("last single", 650e12),
    ("img_in", 200e12),
    ("final linear", 200e12),
    ("Euler", 1.0e12),
)
"""FLOP/s of products and attention, bytes per second of what memory bounds; the first entry found in a name counts."""
GAPS_MS = 1.0
"""Between kernels, when the host is ahead."""


def predicted_ms(operation: Operation) -> float:
    """Milliseconds of an operation's launches together."""
    rate = next(rate for name, rate in EXPECTED_RATES if name in operation.name)
    work = operation.flops if operation.kind in {"gemm", "attention"} else operation.bytes
    return 1e3 * work / rate


def predicted_step_ms(params: TransformerParams, tokens: Tokens) -> dict[str, float]:
    """Milliseconds by class of kernel, and of the gaps."""
    sums: dict[str, float] = {}
    for operation in step_operations(params, tokens):
        name = kernel_class(operation)
        sums[name] = sums.get(name, 0.0) + predicted_ms(operation)
    return {**sums, "gaps": GAPS_MS}


MULTIPROCESSORS = 132
TILE = (128, 256)
"""Rows and columns of a result that one multiprocessor of Hopper computes at a time in large 16-bit products (est.)."""
WAIT_MS = 3e-3
"""Until a stream goes on that waited for another (est.)."""


@dataclass(frozen=True)
class TextBeside:
    """What computing the text stream's products beside the image stream's should bring, in milliseconds a step.

    Args:
        products: the text stream's alone, in whole waves of tiles.
        idle: of it, the time in which multiprocessors have no tile of theirs: the image stream's tiles fill it at the best.
        waits: of the image stream's at the end of what goes beside it, twice a block.
    """

    products: float
    idle: float
    waits: float

    @property
    def saved(self) -> float:
        """What is left."""
        return self.idle - self.waits


def text_beside(params: TransformerParams, tokens: Tokens) -> TextBeside:
    """Predict it for an H100, each of whose multiprocessors has a part of the rate that is expected of the image's products."""
    width, mlp = params.hidden_size, params.mlp_width
    rate = dict(EXPECTED_RATES)["double image"]
    row_tiles = math.ceil((tokens.text + tokens.style) / TILE[0])
    products = idle = 0.0
    for columns, inner in ((3 * width, width), (width, width), (mlp, width), (width, mlp)):
        wave_ms = 1e3 * 2 * math.prod(TILE) * inner / (rate / MULTIPROCESSORS)
        waves = row_tiles * math.ceil(columns / TILE[1]) / MULTIPROCESSORS
        products += params.depth * math.ceil(waves) * wave_ms
        idle += params.depth * (math.ceil(waves) - waves) * wave_ms
    return TextBeside(products, idle, 2 * params.depth * WAIT_MS)
