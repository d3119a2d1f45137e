"""What stays on the GPU and what is brought from pinned host memory when it is needed: a pure function over sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from .autoencoder_sizes import Cut
from .phases import (
    GIB,
    MODULATION,
    PCIE_BYTES_PER_S,
    RESERVE_BYTES,
    Choice,
    Phase,
    block_buffers,
    block_bytes,
    moved_bytes_of,
    peak_of,
    phases_of,
    repeated_bytes_of,
    resident_of,
)
from .sizes import EngineSizes, RequestSize, TransformerSizes


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything is.

    Args:
        budget_bytes: GPU memory that may be used.
        resident: parts that stay on the GPU, with their bytes.
        streamed: parts that are brought in when they run, with their bytes.
        streamed_double_blocks: double blocks brought in at every step.
        streamed_single_blocks: single blocks brought in at every step.
        decoding: how the planned images are decoded.
        phases: peaks, in the order of a request.
        moved_bytes: between host and GPU per request when nothing is cached.
        transfer_s: how long that takes at the assumed rate; partly hidden behind computing.
        problems: why the budget is too small; empty if it is not.
    """

    budget_bytes: int
    resident: dict[str, int]
    streamed: dict[str, int]
    streamed_double_blocks: tuple[int, ...]
    streamed_single_blocks: tuple[int, ...]
    decoding: Cut
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

    def peak_for(self, sizes: EngineSizes, work: RequestSize) -> Phase:
        """The highest phase of another request under this plan, with what is kept free."""
        phases = self._phases_with(self.decoding_for(sizes, work), sizes, work)
        highest = max(phases, key=lambda phase: phase.peak_bytes)
        return Phase(highest.name, highest.peak_bytes + RESERVE_BYTES)

    def decoding_for(self, sizes: EngineSizes, work: RequestSize) -> Cut:
        """How a request's images are decoded: the fastest way that keeps within the budget, or else the smallest.

        Whether images are cut does not depend on their number: an image has the same bits alone and among others.
        """

        def fits(cut: Cut, images: int) -> bool:
            phases = {phase.name: phase for phase in self._phases_with(cut, sizes, replace(work, images=images))}
            return phases["decoding"].peak_bytes + RESERVE_BYTES <= self.budget_bytes

        uncut = [cut for cut in sizes.cuts if cut == "whole" and fits(cut, images=1)]
        others = [cut for cut in sizes.cuts if cut != "whole"]
        return next((cut for cut in [*uncut, *(cut for cut in others if fits(cut, work.images))]), others[-1])

    def _phases_with(self, decoding: Cut, sizes: EngineSizes, work: RequestSize) -> list[Phase]:
        choice = Choice(frozenset(self.streamed), self.streamed_double_blocks, self.streamed_single_blocks, decoding)
        return phases_of(choice, sizes, work)

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "too small"
        lines = [
            f"budget {_gib(self.budget_bytes)}: {verdict}, peak {_gib(self.peak_bytes)}, {_gib(RESERVE_BYTES)} of it kept free"
        ]
        lines += [f"  {problem}" for problem in self.problems]
        if not self.fits:
            return "\n".join(lines)
        lines.append("  on the GPU: " + _listed(self.resident))
        if self.streamed:
            lines.append("  from the host when needed: " + _listed(self.streamed))
        blocks = len(self.streamed_double_blocks) + len(self.streamed_single_blocks)
        if blocks:
            lines.append(f"  {blocks} blocks from the host at every step")
        if self.decoding != "whole":
            kept = ", with what lies between layers on the host" if self.decoding == "host strips" else ""
            lines.append(f"  autoencoder decodes in strips{kept}; pictures differ by rounding")
        lines.append(
            f"  {self.moved_bytes / 1e9:.1f} GB moved per request: {self.transfer_s:.1f} s at {PCIE_BYTES_PER_S / 1e9:.0f} GB/s"
        )
        lines.append("  peaks: " + ", ".join(f"{phase.name} {_gib(phase.peak_bytes)}" for phase in self.phases))
        return "\n".join(lines)


def plan_memory(
    budget_bytes: int,
    sizes: EngineSizes,
    request: RequestSize | None = None,
    *,
    pcie_bytes_per_s: float = PCIE_BYTES_PER_S,
) -> MemoryPlan:
    """Place everything within a budget.

    Args:
        budget_bytes: GPU memory that may be used, all of the process's.
        sizes: of the engine's parts.
        request: that must fit; by default one 1024x1024 image with one content and one style image.
        pcie_bytes_per_s: transfer rate between host and GPU.

    Returns:
        The best plan that fits. If none does: the smallest one, with `problems` that say what does
        not.

    Raises:
        ValueError: a budget or rate that is not positive.
    """
    if budget_bytes <= 0 or pcie_bytes_per_s <= 0:
        raise ValueError(f"budget and rate must be positive, got {budget_bytes} and {pcie_bytes_per_s}")
    work = request if request is not None else RequestSize()
    usable = budget_bytes - RESERVE_BYTES
    fitting = [choice for choice in _choices(sizes, work, usable) if peak_of(choice, sizes, work) <= usable]
    if fitting:
        best = min(fitting, key=lambda choice: _cost(choice, sizes, work))
        return _plan(best, sizes, work, budget_bytes, pcie_bytes_per_s)
    smallest = _smallest(sizes)
    plan = _plan(smallest, sizes, work, budget_bytes, pcie_bytes_per_s)
    problems = tuple(
        f"{phase.name} needs {(phase.peak_bytes + RESERVE_BYTES) / GIB:.3f} GiB even with everything streamed"
        for phase in plan.phases
        if phase.peak_bytes > usable
    )
    return MemoryPlan(**{**vars(plan), "problems": problems})


def _choices(sizes: EngineSizes, work: RequestSize, usable: int) -> Iterator[Choice]:
    """Every set of streamed parts and every way to decode, each with as few streamed blocks as fit."""
    names = [MODULATION, *sizes.components]
    for count in range(len(names) + 1):
        for streamed in combinations(names, count):
            for cut in sizes.cuts:
                choice = Choice(frozenset(streamed), decoding=cut)
                excess = peak_of(choice, sizes, work) - usable
                yield choice if excess <= 0 else _with_streamed_blocks(choice, sizes.transformer, excess)


def _with_streamed_blocks(choice: Choice, transformer: TransformerSizes, excess: int) -> Choice:
    """Stream enough blocks to free `excess` bytes, single ones first, spread evenly so that transfers spread over the step.

    The last single block always stays: it runs through `forward_output_rows`, which has no hook, and it is a sensitive one.
    """
    singles = len(transformer.single_blocks) - 1
    for count in range(1, singles + len(transformer.double_blocks) + 1):
        chosen_singles = _spread(min(count, singles), singles)
        chosen_doubles = _spread(max(0, count - singles), len(transformer.double_blocks))
        candidate = Choice(choice.streamed, chosen_doubles, chosen_singles, choice.decoding)
        if block_bytes(candidate, transformer) - block_buffers(candidate, transformer) >= excess:
            return candidate
    return candidate


def _spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices at even distances."""
    return tuple(int((i + 0.5) * total / count) for i in range(count))


def _smallest(sizes: EngineSizes) -> Choice:
    transformer = sizes.transformer
    return Choice(
        frozenset({MODULATION, *sizes.components}),
        tuple(range(len(transformer.double_blocks))),
        tuple(range(len(transformer.single_blocks) - 1)),
        sizes.cuts[-1],
    )


def _cost(choice: Choice, sizes: EngineSizes, work: RequestSize) -> tuple[int, int, int]:
    """What makes a choice worse, the worst first.

    What moves over and over, blocks or strips; then strips, which round otherwise than the whole; then what moves once.
    """
    cut = sizes.cuts.index(choice.decoding)
    return repeated_bytes_of(choice, sizes, work), cut, moved_bytes_of(choice, sizes, work)


def _plan(choice: Choice, sizes: EngineSizes, work: RequestSize, budget_bytes: int, rate: float) -> MemoryPlan:
    streamed: dict[str, int] = {}
    if MODULATION in choice.streamed:
        streamed[MODULATION] = sum(sizes.transformer.modulation)
    streamed.update({name: part.weight_bytes for name, part in sizes.components.items() if name in choice.streamed})
    moved = moved_bytes_of(choice, sizes, work)
    return MemoryPlan(
        budget_bytes=budget_bytes,
        resident=resident_of(choice, sizes),
        streamed=streamed,
        streamed_double_blocks=choice.double_blocks,
        streamed_single_blocks=choice.single_blocks,
        decoding=choice.decoding,
        phases=tuple(phases_of(choice, sizes, work)),
        moved_bytes=moved,
        transfer_s=moved / rate,
    )


def describe_plans(
    sizes: EngineSizes, budgets_gib: Sequence[float] = (24, 16, 12, 8), request: RequestSize | None = None
) -> str:
    """Plans for several budgets as text, for ``uso-engine info``."""
    transformer = sizes.transformer
    head = (
        f"transformer {transformer.without_modulation / 1e9:.2f} GB without modulation linears "
        f"({sum(transformer.modulation) / 1e9:.2f} GB); parts around it: the public models"
    )
    return "\n".join([head, *(str(plan_memory(int(budget * GIB), sizes, request)) for budget in budgets_gib)])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
