"""What every block of an evaluation shares: the batch, the ways to compute that can be chosen, and what was prepared for it.

A step's shapes, strides, weights and kernels are those of the step before. So each block looks at its layers once for a batch
and gives back a function of what does change; a `Run` keeps these functions as long as the layers are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from uso_kernels.attention import prepare_attention
from uso_kernels.launch import current_device
from uso_kernels.operation import is_watched
from uso_kernels.ragged import Ragged

from .hooks import LayerGroup, hooks_everywhere
from .modulation import ModulationLinear
from .packing import PackedBatch
from .side_stream import First, Second, SideStream


@dataclass(frozen=True)
class Fusion:
    """Which passes over the data a step does without; each can be switched off, to be measured.

    Args:
        gelu: activate inside the product, where the next one reads floats, and not in a pass of its own.
        parts: multiply a single block's matrices by their parts, where they take floats: attention's result and the MLP's
            hidden layer each where they are, and the second product adds to the first.
        values: let attention read values where the projection wrote them, where those rows are in joint order.
    """

    gelu: bool = True
    parts: bool = True
    values: bool = True


ALL_FUSED = Fusion()
Made = TypeVar("Made")


class Layers:
    """The layers of a block as they stand: which modules and tensors, where in memory, and whether anyone hooks into them.

    Args:
        block: what to look at; its modulation linears have no part in a step and are left out.
    """

    def __init__(self, block: nn.Module) -> None:
        modules = _modules(block)
        holders = [held for module in modules for held in (module._modules, module._parameters, module._buffers)]
        self._holders = [holder for holder in holders if holder]
        # Kept, so that no other object can have one's id.
        self._values = [value for holder in self._holders for value in holder.values()]
        self._ids = list(map(id, self._values))
        called = [module for module in modules if not isinstance(module, LayerGroup)]
        self._hooks = [hooks for module in called for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self._attributes = [vars(module) for module in called]
        self._was_hooked = self._is_hooked()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    @property
    def is_current(self) -> bool:
        """Whether nothing was replaced, moved or hooked into; what has or had hooks may change with every call."""
        if self._was_hooked or self._is_hooked():
            return False
        if [id(value) for holder in self._holders for value in holder.values()] != self._ids:
            return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._addresses

    def _is_hooked(self) -> bool:
        """As `is_hooked` of any layer, of what is looked at in every step: backward hooks and those on all modules are not."""
        return any(self._hooks) or True in ["forward" in attributes for attributes in self._attributes]


def _modules(block: nn.Module) -> list[nn.Module]:
    found = [block]
    for child in block.children():
        if not isinstance(child, ModulationLinear):
            found += _modules(child)
    return found


class Exchange(Protocol):
    """Attention where other processes have the batch's other rows; `uso_engine.parallel.exchange` is the real one."""

    def begin(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, backend: str) -> Callable[[], Tensor]:
        """Begin attention of this process's queries to every process's keys; what follows is computed while they are sent.

        Args:
            q: [T_q, H, D], rows of this process's share.
            k: [T, H, D], rows of its share in joint order.
            v: [T, H, D].
            queries: where q's rows lie: the joint or the output layout of the share's batch.
            backend: of `uso_kernels.attention`, or "auto".

        Returns:
            A function that waits for the others' and gives [T_q, H, D].
        """


@dataclass(frozen=True, eq=False)
class Run:
    """Evaluations of one batch, one after another.

    Args:
        batch: the sequences.
        attention: a backend of `uso_kernels.attention`, or "auto".
        fusion: which passes over the data are left out.
        exchange: how attention reaches the rows that other processes have; None where all rows are here.
        repeat: computes the velocity of latents and modulation in place of the blocks, as a captured step does; None: nothing.
        beside: the stream for work that can be computed beside other work; None: one after the other.
    """

    batch: PackedBatch
    attention: str = "auto"
    fusion: Fusion = ALL_FUSED
    exchange: Exchange | None = None
    repeat: Callable[[Tensor, Tensor], Tensor] | None = None
    beside: SideStream | None = None
    _prepared: dict[nn.Module, tuple[Layers, object]] = field(default_factory=dict, repr=False)
    _kept: dict[str, tuple[object, object]] = field(default_factory=dict, repr=False)

    def begin(self, *operands: Tensor) -> bool:
        """Begin an evaluation.

        Args:
            operands: what changes from one to the next.

        Returns:
            Whether what was prepared serves this one, too. Else it is dropped: a layer is not what it was, an operand has
            another layout, or autograd, a compiler, a mode or a hook on all modules has to see what is computed.
        """
        watched = is_watched() or hooks_everywhere()
        layouts = [current_device(), watched, *((x.dtype, x.device, x.shape, x.stride()) for x in operands)]
        serves = not watched and self._kept.get("layouts") == (None, layouts)
        serves = serves and all(layers.is_current for layers, _ in self._prepared.values())
        if not serves:
            self._prepared.clear()
            self._kept.clear()
            self._kept["layouts"] = (None, layouts)
        return serves

    def prepared(self, block: nn.Module, prepare: Callable[[Run], Made]) -> Made:
        """A block's function for this batch, made when it is first asked for."""
        if block._forward_pre_hooks:
            # The hook may have given it other weights a moment ago, as the streaming of layers does.
            return prepare(self)
        found = self._prepared.get(block)
        if found is None:
            found = self._prepared[block] = Layers(block), prepare(self)
        made: Made = found[1]  # type: ignore[assignment]
        return made

    def has_prepared(self, blocks: Iterable[nn.Module]) -> bool:
        """Whether it has a function of each block, so that `begin` looks at the layers of all of them."""
        return all(block in self._prepared for block in blocks)

    def pair(self, first: First, second: Second, layers: Sequence[nn.Module]) -> tuple[First, Second]:
        """Two functions that need nothing of each other, called in this order with nothing between.

        Args:
            first: the longer work.
            second: the work that may be computed beside it.
            layers: what they compute with.

        Returns:
            Functions to call in their places, `SideStream.pair`'s; the same two where there is no second stream.

        Raises:
            ValueError: there is one, but not for this work; says why.
        """
        if self.beside is None:
            return first, second
        return self.beside.pair(first, second, layers, self.batch.text_tokens.device)

    def prepare_keys(self) -> Callable[[Tensor], Tensor] | None:
        """What makes attention's keys, or its values, of those in joint order; None where they are the same.

        A function of its own, so that a block can let go of what it was made of before attention begins. Where other processes
        have rows, they are sent without copies.
        """
        return None if self.exchange is not None or self.batch.keys.sources is None else self.batch.keys.take

    def prepare_attention(
        self, dtype: torch.dtype, queries: Ragged
    ) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
        """Attention within each sequence, at one place of a step, with what can be looked up before.

        It is begun with its operands, and its result is called for where it is read: what a block computes between goes on
        while processes exchange their rows. Where all rows are here, it is computed when it is begun.

        Args:
            dtype: of the operands.
            queries: where q's rows lie: the batch's joint or output layout.

        Returns:
            A function of q [T_q, H, D] and of k and v as `prepare_keys` makes them; it gives a function of the result.
        """
        # None of these functions holds the run, which holds them: what is kept of a batch goes with it at once.
        backend, exchange = self.attention, self.exchange
        if exchange is not None:
            return lambda q, k, v: exchange.begin(q, k, v, queries, backend)
        like = self.batch.text_tokens.new_empty(0, dtype=dtype)
        attend = prepare_attention(backend, like, queries, self.batch.keys.layout)

        def begin(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            attended = attend(q, k, v)
            return lambda: attended

        return begin

    def vectors(self, modulation: Tensor, split: Callable[[Tensor], Made]) -> Made:
        """What is split of a step's modulation, made once for a tensor whose contents change from step to step."""
        found = self._kept.get("vectors")
        if found is None or found[0] is not modulation:
            found = self._kept["vectors"] = modulation, split(modulation)
        made: Made = found[1]  # type: ignore[assignment]
        return made
