"""What a step divided among N GPUs of one machine should take: a share of every operation, and what is exchanged.

    computing    every product and elementwise pass on 1 / N of the rows, attention on 1 / N of the heads     (`prediction`)
    exchanged    per block 4 L C / N numbers of q, k, v and attention's result leave a GPU, (N - 1) / N of them
    copies       11 L C / N numbers read and written around the two all-to-alls: stacked, cut by head, put in order, and back
    waits        two all-to-alls a block begin with a wait for the slowest
    hidden       in single blocks q, k and v travel while the MLP's hidden layer is computed: the shorter of the two is saved

Products are taken at the rates of whole sequences, though a share of 700 rows fills a GPU less well, and as fast beside an
exchange as alone, though NCCL takes some of the GPU's processors for it. `text_stream_saving_ms` is of what is not built.
"""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import BF16, Tokens, step_operations

from .prediction import GAPS_MS, predicted_ms, predicted_step_ms

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
        hidden: of the exchanging, behind products.
    """

    computing: float
    exchanging: float
    copying: float
    waiting: float
    hidden: float

    @property
    def all(self) -> float:
        """What it takes in all."""
        return self.computing + self.exchanging + self.copying + self.waiting - self.hidden


def exchanged_bytes(params: TransformerParams, tokens: Tokens, size: int) -> float:
    """Bytes that each of so many GPUs sends in a step."""
    blocks = params.depth + params.depth_single_blocks
    return blocks * 4 * tokens.all * params.hidden_size * BF16 / size * (size - 1) / size


def parallel_step(params: TransformerParams, tokens: Tokens, size: int, link: Link) -> ParallelStep:
    """Predict a step on so many H100s."""
    blocks = params.depth + params.depth_single_blocks
    computing = (sum(predicted_step_ms(params, tokens).values()) - GAPS_MS) / size + GAPS_MS
    if size == 1:
        return ParallelStep(computing, 0.0, 0.0, 0.0, 0.0)
    copied = blocks * 2 * COPIED * tokens.all * params.hidden_size * BF16 / size
    return ParallelStep(
        computing,
        1e3 * exchanged_bytes(params, tokens, size) / link.bytes_per_s,
        1e3 * copied / COPY_RATE,
        1e3 * 2 * blocks * ALL_TO_ALL_S,
        hidden_ms(params, tokens, size, link),
    )


def hidden_ms(params: TransformerParams, tokens: Tokens, size: int, link: Link) -> float:
    """Milliseconds of a step's exchanges that products hide: q, k and v of every single block behind its hidden layer.

    The last block is left out: its hidden layer has the rows of the images being made only.
    """
    blocks = params.depth_single_blocks - 1
    return blocks * min(
        3 * tokens.all * _row_ms(params, size, link), _share_ms(params, tokens, size, "single linear1 mlp") / blocks
    )


def text_stream_saving_ms(params: TransformerParams, tokens: Tokens, size: int, link: Link) -> float:
    """What sending image and text apart would save in the double blocks, in milliseconds a step; below 0 it would cost.

    The image's q, k and v would travel beside the text's product of them, and the image's part of attention's result beside
    the text's output projection and MLP. Four all-to-alls a block instead of two have two more waits.
    """
    travelling = (tokens.image + tokens.content) * _row_ms(params, size, link)
    before = _share_ms(params, tokens, size, "double text qkv") / params.depth
    after = sum(_share_ms(params, tokens, size, f"double text {name}") for name in ("proj", "mlp.0", "mlp.2")) / params.depth
    return params.depth * (min(3 * travelling, before) + min(travelling, after) - 1e3 * 2 * ALL_TO_ALL_S)


def _row_ms(params: TransformerParams, size: int, link: Link) -> float:
    """Milliseconds in which one row of the whole batch, of C numbers, is among what each GPU sends in an all-to-all."""
    return 1e3 * params.hidden_size * BF16 / size * (size - 1) / size / link.bytes_per_s


def _share_ms(params: TransformerParams, tokens: Tokens, size: int, name: str) -> float:
    """Milliseconds of a GPU's share of an operation, all its repetitions together."""
    return next(predicted_ms(found) for found in step_operations(params, tokens) if found.name == name) / size
