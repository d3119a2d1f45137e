"""What stays on the GPU and what is brought from pinned host memory when it is needed: a pure function over sizes.

A request is a row of phases: text, style, content, admission, denoising, decoding, safety. A part is resident, or streamed:
moved in layer by layer while it runs, two layers at a time. Modulation linears run at admission only, so streaming them costs
one transfer per request; streamed blocks cost one per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from .engine_sizes import (
    AUTOENCODER_DECODE_BYTES_PER_PIXEL,
    AUTOENCODER_ENCODE_BYTES_PER_PIXEL,
    ROW_WIDTHS,
    EngineSizes,
    TransformerSizes,
    Workload,
)

GIB = 1 << 30
PCIE_BYTES_PER_S = 25e9
"""Assumed transfer rate: PCIe 4.0 x16 carries 31.5 GB/s each way (PCI-SIG), pinned copies reach about 80 % of it (est.)."""

RESERVE_BYTES = GIB
"""Kept free for the CUDA context, library workspaces and what the allocator cannot hand out again (est.)."""

MODULATION = "modulation linears"
TILE_SIDES = (None, 512, 256)
"""Sides of the tiles, in pixels, that the autoencoder may decode in; None: the whole image at once."""

_BUFFERS = 2
"""Layers of a streamed part on the GPU at once: the one that runs and the next on its way."""


@dataclass(frozen=True)
class Phase:
    """What the GPU holds at one point of a request."""

    name: str
    peak_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything is.

    Args:
        budget_bytes: GPU memory that may be used.
        resident: parts that stay on the GPU, with their bytes.
        streamed: parts that are brought in when they run, with their bytes.
        streamed_double_blocks: double blocks brought in at every step.
        streamed_single_blocks: single blocks brought in at every step.
        tile_side: side in pixels of the tiles that the autoencoder decodes in; None for the whole image.
        phases: peaks, in the order of a request.
        moved_bytes: brought to the GPU per request when nothing is cached.
        transfer_s: how long that takes at the assumed rate; partly hidden behind computing.
        problems: why the budget is too small; empty if it is not.
    """

    budget_bytes: int
    resident: dict[str, int]
    streamed: dict[str, int]
    streamed_double_blocks: tuple[int, ...]
    streamed_single_blocks: tuple[int, ...]
    tile_side: int | None
    phases: tuple[Phase, ...]
    moved_bytes: int
    transfer_s: float
    problems: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether the budget is enough."""
        return not self.problems

    @property
    def peak_bytes(self) -> int:
        """The highest point of a request, with what is kept free."""
        return max(phase.peak_bytes for phase in self.phases) + RESERVE_BYTES

    def __str__(self) -> str:
        lines = [f"budget {_gib(self.budget_bytes)}: {'fits' if self.fits else 'too small'}, peak {_gib(self.peak_bytes)}"]
        lines += [f"  {problem}" for problem in self.problems]
        if not self.fits:
            return "\n".join(lines)
        lines.append("  on the GPU: " + _listed(self.resident))
        if self.streamed:
            lines.append("  from the host when needed: " + _listed(self.streamed))
        blocks = len(self.streamed_double_blocks) + len(self.streamed_single_blocks)
        if blocks:
            lines.append(f"  {blocks} blocks from the host at every step")
        if self.tile_side is not None:
            lines.append(f"  autoencoder decodes in tiles of {self.tile_side} pixels")
        lines.append(
            f"  {self.moved_bytes / 1e9:.1f} GB moved per request: {self.transfer_s:.1f} s at {PCIE_BYTES_PER_S / 1e9:.0f} GB/s"
        )
        lines.append("  peaks: " + ", ".join(f"{phase.name} {_gib(phase.peak_bytes)}" for phase in self.phases))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Choice:
    """One way to place everything."""

    streamed: frozenset[str]
    double_blocks: tuple[int, ...] = ()
    single_blocks: tuple[int, ...] = ()
    tile_side: int | None = None


def plan_memory(
    budget_bytes: int, sizes: EngineSizes, workload: Workload | None = None, *, pcie_bytes_per_s: float = PCIE_BYTES_PER_S
) -> MemoryPlan:
    """Place everything within a budget.

    Args:
        budget_bytes: GPU memory that may be used, all of the process's.
        sizes: of the engine's parts.
        workload: the request that must fit; by default one 1024x1024 image with one content and one style image.
        pcie_bytes_per_s: transfer rate between host and GPU.

    Returns:
        The best plan that fits. If none does: the smallest one, with `problems` that say what does
        not.

    Raises:
        ValueError: a budget or rate that is not positive.
    """
    if budget_bytes <= 0 or pcie_bytes_per_s <= 0:
        raise ValueError(f"budget and rate must be positive, got {budget_bytes} and {pcie_bytes_per_s}")
    work = workload if workload is not None else Workload()
    usable = budget_bytes - RESERVE_BYTES
    fitting = [choice for choice in _choices(sizes, work, usable) if _peak(choice, sizes, work) <= usable]
    if fitting:
        best = min(fitting, key=lambda choice: _cost(choice, sizes, work))
        return _plan(best, sizes, work, budget_bytes, pcie_bytes_per_s)
    smallest = _smallest(sizes)
    plan = _plan(smallest, sizes, work, budget_bytes, pcie_bytes_per_s)
    problems = tuple(
        f"{phase.name} needs {_gib(phase.peak_bytes + RESERVE_BYTES)} even with everything streamed"
        for phase in plan.phases
        if phase.peak_bytes > usable
    )
    return MemoryPlan(**{**vars(plan), "problems": problems})


def _choices(sizes: EngineSizes, work: Workload, usable: int) -> Iterator[_Choice]:
    """Every set of streamed parts and every tile, each with as few streamed blocks as fit."""
    names = [MODULATION, *sizes.components]
    for count in range(len(names) + 1):
        for streamed in combinations(names, count):
            for tile_side in TILE_SIDES:
                choice = _Choice(frozenset(streamed), tile_side=tile_side)
                excess = _peak(choice, sizes, work) - usable
                yield choice if excess <= 0 else _with_streamed_blocks(choice, sizes.transformer, excess)


def _with_streamed_blocks(choice: _Choice, transformer: TransformerSizes, excess: int) -> _Choice:
    """Stream enough blocks to free `excess` bytes, single ones first, spread evenly so that transfers spread over the step.

    The last single block always stays: it is entered by another door (`forward_output_rows`), and it is a sensitive one.
    """
    singles = len(transformer.single_blocks) - 1
    for count in range(1, singles + len(transformer.double_blocks) + 1):
        chosen_singles = _spread(min(count, singles), singles)
        chosen_doubles = _spread(max(0, count - singles), len(transformer.double_blocks))
        candidate = _Choice(choice.streamed, chosen_doubles, chosen_singles, choice.tile_side)
        if _block_bytes(candidate, transformer) - _block_buffers(candidate, transformer) >= excess:
            return candidate
    return candidate


def _spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices at even distances."""
    return tuple(int((i + 0.5) * total / count) for i in range(count))


def _smallest(sizes: EngineSizes) -> _Choice:
    transformer = sizes.transformer
    return _Choice(
        frozenset({MODULATION, *sizes.components}),
        tuple(range(len(transformer.double_blocks))),
        tuple(range(len(transformer.single_blocks) - 1)),
        min(side for side in TILE_SIDES if side is not None),
    )


def _streamed_blocks(choice: _Choice, transformer: TransformerSizes) -> list[int]:
    doubles = [transformer.double_blocks[i] for i in choice.double_blocks]
    return doubles + [transformer.single_blocks[i] for i in choice.single_blocks]


def _block_bytes(choice: _Choice, transformer: TransformerSizes) -> int:
    return sum(_streamed_blocks(choice, transformer))


def _block_buffers(choice: _Choice, transformer: TransformerSizes) -> int:
    return sum(sorted(_streamed_blocks(choice, transformer))[-_BUFFERS:])


def _phases(choice: _Choice, sizes: EngineSizes, work: Workload) -> list[Phase]:
    transformer, parts = sizes.transformer, sizes.components
    resident = sum(_resident(choice, sizes).values())

    def running(name: str) -> int:
        part = parts[name]
        moved = part.fixed_bytes + _BUFFERS * part.largest_layer_bytes if name in choice.streamed else 0
        return moved + part.working_bytes

    modulation = _BUFFERS * max(transformer.modulation) if MODULATION in choice.streamed else 0
    table = 2 * work.images * work.steps * transformer.vectors * transformer.hidden_size
    activations = 2 * ROW_WIDTHS * work.rows * transformer.hidden_size + transformer.scratch
    pixels = work.width * work.height if choice.tile_side is None else choice.tile_side**2
    # A whole image is decoded one at a time; the finished ones wait in float32.
    decoding = AUTOENCODER_DECODE_BYTES_PER_PIXEL * pixels + 12 * work.images * work.width * work.height
    loads = {
        "text": max(running("T5"), running("CLIP")),
        "style": running("SigLIP and projector") if work.styles else 0,
        "content": running("autoencoder") + AUTOENCODER_ENCODE_BYTES_PER_PIXEL * work.CONTENT_SIDE**2 if work.contents else 0,
        "admission": modulation + table,
        "denoising": _block_buffers(choice, transformer) + table + activations,
        "decoding": running("autoencoder") + decoding,
        "safety": running("safety classifier"),
    }
    return [Phase(name, resident + load) for name, load in loads.items()]


def _peak(choice: _Choice, sizes: EngineSizes, work: Workload) -> int:
    return max(phase.peak_bytes for phase in _phases(choice, sizes, work))


def _resident(choice: _Choice, sizes: EngineSizes) -> dict[str, int]:
    transformer = sizes.transformer
    resident = {"transformer": transformer.without_modulation - _block_bytes(choice, transformer)}
    if MODULATION not in choice.streamed:
        resident[MODULATION] = sum(transformer.modulation)
    resident.update({name: part.weight_bytes for name, part in sizes.components.items() if name not in choice.streamed})
    return resident


def _moved(choice: _Choice, sizes: EngineSizes, work: Workload) -> int:
    uses = {
        "SigLIP and projector": work.styles,
        # To encode all contents, then to decode.
        "autoencoder": (1 if work.contents else 0) + 1,
    }
    moved = sum(part.weight_bytes * uses.get(name, 1) for name, part in sizes.components.items() if name in choice.streamed)
    if MODULATION in choice.streamed:
        moved += sum(sizes.transformer.modulation)
    return moved + work.steps * _block_bytes(choice, sizes.transformer)


def _cost(choice: _Choice, sizes: EngineSizes, work: Workload) -> tuple[int, bool, int, int]:
    """What makes a choice worse, the worst first: blocks moved at every step, tiles (they change the picture), transfers."""
    tile = choice.tile_side
    return _block_bytes(choice, sizes.transformer), tile is not None, -(tile or 0), _moved(choice, sizes, work)


def _plan(choice: _Choice, sizes: EngineSizes, work: Workload, budget_bytes: int, rate: float) -> MemoryPlan:
    streamed: dict[str, int] = {}
    if MODULATION in choice.streamed:
        streamed[MODULATION] = sum(sizes.transformer.modulation)
    streamed.update({name: part.weight_bytes for name, part in sizes.components.items() if name in choice.streamed})
    moved = _moved(choice, sizes, work)
    return MemoryPlan(
        budget_bytes=budget_bytes,
        resident=_resident(choice, sizes),
        streamed=streamed,
        streamed_double_blocks=choice.double_blocks,
        streamed_single_blocks=choice.single_blocks,
        tile_side=choice.tile_side,
        phases=tuple(_phases(choice, sizes, work)),
        moved_bytes=moved,
        transfer_s=moved / rate,
    )


def describe_plans(sizes: EngineSizes, budgets_gib: Sequence[float] = (24, 16, 12, 8), workload: Workload | None = None) -> str:
    """Plans for several budgets as text, for ``uso-engine info``."""
    transformer = sizes.transformer
    head = (
        f"transformer {transformer.without_modulation / 1e9:.2f} GB without modulation linears "
        f"({sum(transformer.modulation) / 1e9:.2f} GB)"
    )
    return "\n".join([head, *(str(plan_memory(int(budget * GIB), sizes, workload)) for budget in budgets_gib)])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
