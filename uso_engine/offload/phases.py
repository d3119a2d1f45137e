"""What the GPU holds at each point of a request, for one way to place an engine's parts: arithmetic, nothing is loaded.

A request is a row of phases: text, style, content, admission, denoising, decoding, safety. A part is resident, or streamed:
moved in layer by layer while it runs, two layers at a time. Modulation linears run at admission only, so streaming them costs
one transfer per request; streamed blocks cost one per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from .autoencoder_sizes import STRIP_PIXELS, Cut
from .sizes import EngineSizes, RequestSize, TransformerSizes

GIB = 1 << 30
PCIE_BYTES_PER_S = 25e9
"""Assumed transfer rate: PCIe 4.0 x16 carries 31.5 GB/s each way (PCI-SIG), pinned copies reach about 80 % of it (est.)."""

RESERVE_BYTES = GIB
"""Kept free for the CUDA context, library workspaces and what the allocator cannot hand out again (est.)."""

MODULATION = "modulation linears"
"""Name of the part."""

BUFFERS = 2
"""Layers of a streamed part on the GPU at once: the one that runs and the next on its way."""


@dataclass(frozen=True)
class Phase:
    """What the GPU holds at one point of a request."""

    name: str
    peak_bytes: int


@dataclass(frozen=True)
class Choice:
    """One way to place everything."""

    streamed: frozenset[str]
    double_blocks: tuple[int, ...] = ()
    single_blocks: tuple[int, ...] = ()
    decoding: Cut = "whole"


def _streamed_blocks(choice: Choice, transformer: TransformerSizes) -> list[int]:
    doubles = [transformer.double_blocks[i] for i in choice.double_blocks]
    return doubles + [transformer.single_blocks[i] for i in choice.single_blocks]


def block_bytes(choice: Choice, transformer: TransformerSizes) -> int:
    """Bytes of the streamed blocks, which are moved at every step."""
    return sum(_streamed_blocks(choice, transformer))


def block_buffers(choice: Choice, transformer: TransformerSizes) -> int:
    """Bytes on the GPU through which blocks are streamed: every buffer takes the largest of them."""
    blocks = _streamed_blocks(choice, transformer)
    return min(BUFFERS, len(blocks)) * max(blocks, default=0)


def table_bytes(transformer: TransformerSizes, work: RequestSize) -> int:
    """What a request holds from its first step to its last: modulation tables, and a step's rows of them."""
    # Images of one prompt share a table; a step gathers its rows for every sequence.
    prompts = 2 if work.negative else 1
    return (prompts * work.steps + work.sequences) * transformer.vectors * transformer.hidden_size * transformer.itemsize


def row_bytes(transformer: TransformerSizes) -> int:
    """Activations of a step for each packed row."""
    return transformer.row_widths * transformer.hidden_size * transformer.itemsize


def phases_of(choice: Choice, sizes: EngineSizes, work: RequestSize) -> list[Phase]:
    """Every phase of a request with its peak."""
    transformer = sizes.transformer
    resident = sum(resident_of(choice, sizes).values())

    def running(name: str) -> int:
        part = sizes.components.get(name)
        if part is None:
            return 0
        moved = part.fixed_bytes + BUFFERS * part.largest_layer_bytes if name in choice.streamed else 0
        return moved + part.working_bytes

    modulation = BUFFERS * max(transformer.modulation) if MODULATION in choice.streamed else 0
    table = table_bytes(transformer, work)
    activations = work.rows * row_bytes(transformer) + transformer.scratch
    pixels, strip_pixels = work.width * work.height, sizes.strip_pixels or STRIP_PIXELS
    # One image is decoded at a time; the finished ones wait in float32.
    decoding = sizes.decoder.peak_bytes(choice.decoding, pixels, strip_pixels) + 12 * work.images * pixels
    encoding = sizes.encoder.peak_bytes(sizes.encoding, max(work.content_side**2, work.start_pixels), strip_pixels)
    loads = {
        "text": max(running("T5"), running("CLIP")),
        "style": running("SigLIP and projector") if work.styles else 0,
        "content": running("autoencoder") + encoding if work.contents else 0,
        "admission": modulation + table,
        "denoising": block_buffers(choice, transformer) + table + activations,
        "decoding": running("autoencoder") + decoding,
        "safety": running("safety classifier"),
    }
    return [Phase(name, resident + load) for name, load in loads.items()]


def peak_of(choice: Choice, sizes: EngineSizes, work: RequestSize) -> int:
    """Bytes of the highest phase."""
    return max(phase.peak_bytes for phase in phases_of(choice, sizes, work))


def resident_of(choice: Choice, sizes: EngineSizes) -> dict[str, int]:
    """What stays on the GPU, with its bytes."""
    transformer = sizes.transformer
    resident = {"transformer": transformer.without_modulation - block_bytes(choice, transformer)}
    if MODULATION not in choice.streamed:
        resident[MODULATION] = sum(transformer.modulation)
    resident.update({name: part.weight_bytes for name, part in sizes.components.items() if name not in choice.streamed})
    return resident


def repeated_bytes_of(choice: Choice, sizes: EngineSizes, work: RequestSize) -> int:
    """Bytes moved over and over in a request: blocks at every step, and what decoding keeps on the host."""
    pixels, strip_pixels = work.width * work.height, sizes.strip_pixels or STRIP_PIXELS
    decoding = work.images * sizes.decoder.moved_bytes(choice.decoding, pixels, strip_pixels)
    return work.steps * block_bytes(choice, sizes.transformer) + decoding


def moved_bytes_of(choice: Choice, sizes: EngineSizes, work: RequestSize) -> int:
    """Bytes moved between host and GPU per request when nothing is cached."""
    prompts = 2 if work.negative else 1
    uses = {
        "T5": prompts,
        "CLIP": prompts,
        "SigLIP and projector": work.styles,
        # For every content image, then to decode.
        "autoencoder": work.contents + 1,
    }
    moved = sum(part.weight_bytes * uses.get(name, 1) for name, part in sizes.components.items() if name in choice.streamed)
    if MODULATION in choice.streamed:
        moved += prompts * sum(sizes.transformer.modulation)
    return moved + repeated_bytes_of(choice, sizes, work)
