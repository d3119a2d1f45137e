"""What a step divided among N GPUs of one machine should take: a share of every operation, and what is exchanged.

    computing    every product and elementwise pass on 1 / N of the rows, attention on 1 / N of the heads     (`prediction`)
    exchanged    per block 4 L C / N numbers of q, k, v and attention's result leave a GPU, (N - 1) / N of them
    copies       11 L C / N numbers read and written around the two all-to-alls: stacked, cut by head, put in order, and back
    waits        two all-to-alls a block begin with a wait for the slowest

Products are taken at the rates of whole sequences, though a share of 700 rows fills a GPU less well; nothing is overlapped,
since the code overlaps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import BF16, Tokens

from .prediction import GAPS_MS, predicted_step_ms

PUBLISHED_SPEEDUP = {2: 1.54}
"""Of FLUX.1 at 1024 x 1024 on H100s. Source: cache-dit, NVIDIA_GPU.md."""
COPIED = 11
COPY_RATE = 2.4e12
ALL_TO_ALL_S = 25e-6


@dataclass(frozen=True)
class Link:
    """How the GPUs of a machine are connected.

    Args:
        name: of the link.
        bytes_per_s: that a GPU sends in an all-to-all of some MB: 0.8 of the data sheet's rate in one direction.
    """

    name: str
    bytes_per_s: float


LINKS = (Link("NVLink 4", 0.8 * 450e9), Link("PCIe 5.0 x16", 0.8 * 63e9))


@dataclass(frozen=True)
class ParallelStep:
    """A step on N GPUs, in milliseconds.

    Args:
        computing: of one GPU's share.
        exchanging: of what it sends.
        copying: around that.
        waiting: for the all-to-alls to begin.
    """

    computing: float
    exchanging: float
    copying: float
    waiting: float

    @property
    def all(self) -> float:
        """Their sum."""
        return self.computing + self.exchanging + self.copying + self.waiting


def exchanged_bytes(params: TransformerParams, tokens: Tokens, size: int) -> float:
    """Bytes that each of so many GPUs sends in a step."""
    blocks = params.depth + params.depth_single_blocks
    return blocks * 4 * tokens.all * params.hidden_size * BF16 / size * (size - 1) / size


def parallel_step(params: TransformerParams, tokens: Tokens, size: int, link: Link) -> ParallelStep:
    """Predict a step on so many H100s."""
    blocks = params.depth + params.depth_single_blocks
    computing = (sum(predicted_step_ms(params, tokens).values()) - GAPS_MS) / size + GAPS_MS
    if size == 1:
        return ParallelStep(computing, 0.0, 0.0, 0.0)
    copied = blocks * 2 * COPIED * tokens.all * params.hidden_size * BF16 / size
    return ParallelStep(
        computing,
        1e3 * exchanged_bytes(params, tokens, size) / link.bytes_per_s,
        1e3 * copied / COPY_RATE,
        1e3 * 2 * blocks * ALL_TO_ALL_S,
    )
