"""An operation: what it computes, in plain PyTorch, and what computes the same on a GPU.

A module writes two functions of the same operands: the reference, which fills the operands that it writes, and the description
of its launch. The rest is here: an operator for torch with its CUDA kernel and its fake, and the table from which the
interpreter and the tests take every operation there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.graph import increment_version
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .launch import ALIGNMENT, Generation, Launch, PreparedLaunch, current_device, generation_of

OPERATIONS: dict[str, Operation] = {}
"""Every operation whose module was imported, by name."""

NATIVE_DEVICE = "cuda"
"""Type of the devices on whose tensors a call goes straight to the launch."""

Fill = Callable[..., None]


Signature = tuple[object, ...]
MOST_PREPARED = 256
"""Launches that an operation keeps prepared. A step of one batch needs a handful of each; when full, it starts anew."""


@dataclass(frozen=True, eq=False)
class Operation:
    """Call it to fill the operands that it writes, on whatever device they are.

    Args:
        reference: the same in plain PyTorch, on any device.
        op: the operator for torch: the reference on a CPU, `native` on a GPU.
        writes: positions of the operands that it fills or changes.
        native: computes it on a GPU.
        describe: the Triton launch for a generation and operands; None where a library computes it.
        check: raises where operands do not fit together; called before anything that was not called with their like before.
        prepared: launches by what they depend on of their operands.
    """

    reference: Fill
    op: CustomOpDef
    writes: tuple[int, ...]
    native: Fill
    describe: Callable[..., Launch] | None
    check: Fill | None = None
    prepared: dict[Signature, PreparedLaunch] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `OPERATIONS` knows it."""
        return self.reference.__name__

    def __call__(self, *operands: object) -> None:
        """Fill the operands that it writes.

        An operator with a Triton kernel costs 57 us of a CPU's time and Triton's launch 24 of them, 190 times a step. So a call
        on CUDA tensors goes to the launch, which is prepared where operands like these were launched before, unless something
        has to see the operator: autograd, a compiler, a mode that watches operations.
        """
        self.fill(operands)

    def fill(self, operands: tuple[object, ...]) -> PreparedLaunch | None:
        """Fill the operands that it writes.

        Returns:
            The launch for operands like these, where there is one that can be run again: on the current device.
        """
        signature = _signature(operands)
        if signature is None:
            if self.check is not None:
                self.check(*operands)
            self.op(*operands)
            return None
        prepared, is_here = self.prepared.get(signature), signature[0] == current_device()
        if prepared is not None and is_here:
            prepared.run(operands)
        else:
            prepared = self._prepare(signature, operands)
        for position in self.writes:
            written = operands[position]
            # As the operator would: whoever kept the tensor for a backward pass learns that it changed.
            if isinstance(written, Tensor) and not written.is_inference():
                increment_version(written)
        return prepared if is_here else None

    def _prepare(self, signature: Signature, operands: tuple[object, ...]) -> PreparedLaunch | None:
        """Check, compute, and keep the launch for operands like these."""
        if self.check is not None:
            self.check(*operands)
        if self.describe is None:
            self.native(*operands)
            return None
        launch = self.launch(_generation(operands), *operands)
        prepared = launch.prepared(launch.run(), operands)
        if prepared is not None:
            if len(self.prepared) >= MOST_PREPARED:
                self.prepared.clear()
            self.prepared[signature] = prepared
        return prepared

    def launch(self, generation: Generation, *operands: object) -> Launch:
        """The Triton launch for a generation of GPUs; the operands may lie anywhere.

        Raises:
            TypeError: a library computes it.
        """
        if self.describe is None:
            raise TypeError(f"{self.name} is computed by a library and has no Triton kernel")
        return self.describe(generation, *operands)


class CallSite:
    """One place in a step from which an operation is called with operands of one layout each time.

    The first call looks at them; later ones fill their addresses into its launch, which costs a fifth. Whoever keeps a site
    says by that: shapes, strides, types and device stay as they were, every operand that is written is new, and nothing has to
    see the operator (`is_watched`). Where there is no launch to be run again, each call is an ordinary one.

    Args:
        operation: what is called.
    """

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._prepared: PreparedLaunch | None = None

    def __call__(self, *operands: object) -> None:
        if self._prepared is None or not self._prepared.run_aligned(operands):
            prepared = self._operation.fill(operands)
            self._prepared = prepared if prepared is not None and _is_aligned(operands) else None


def is_watched() -> bool:
    """Whether autograd, a compiler or a mode has to see the operators that compute."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _is_aligned(operands: tuple[object, ...]) -> bool:
    return not any(operand.data_ptr() % ALIGNMENT for operand in operands if isinstance(operand, Tensor))


def operation(
    *,
    writes: tuple[str, ...],
    launch: Callable[..., Launch] | None = None,
    library: Fill | None = None,
    check: Fill | None = None,
) -> Callable[[Fill], Operation]:
    """Make a reference an operation.

    Args:
        writes: names of the operands that it fills or changes.
        launch: describes the Triton launch: takes the generation, then the reference's operands.
        library: in place of a launch, what computes it on a GPU: takes the reference's operands.
        check: raises ValueError where the reference's operands do not fit together, by their shapes, strides and types alone.

    Returns:
        A decorator: the operation is called as its reference is, and gives back nothing.

    Raises:
        ValueError: both a launch and a library, or neither.
    """
    if (launch is None) == (library is None):
        raise ValueError("an operation has either a launch or a library's function for a GPU")

    def run(*operands: object) -> None:
        assert launch is not None
        launch(_generation(operands), *operands).run()

    def register(reference: Fill) -> Operation:
        op = torch.library.custom_op(f"uso_kernels::{reference.__name__}", reference, mutates_args=writes)
        native = run if library is None else library
        op.register_kernel("cuda")(native)
        op.register_fake(lambda *operands: None)  # It only writes, so tracing has nothing to make.
        names = list(inspect.signature(reference).parameters)
        made = Operation(reference, op, tuple(map(names.index, writes)), native, launch, check)
        OPERATIONS[made.name] = made
        return made

    return register


def _generation(operands: tuple[object, ...]) -> Generation:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    # Of a type without a kernel, so that the error names it.
    return generation_of(next((tensor for tensor in tensors if tensor.dtype == torch.float64), tensors[0]))


def _signature(operands: tuple[object, ...]) -> Signature | None:
    """All that a launch depends on but its operands' addresses: the device's index, then each operand's layout.

    None unless all are ordinary tensors of one GPU in eager mode and nothing has to see the operator that works on them.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    records, index = torch.is_grad_enabled(), None
    found: list[object] = [None]
    for operand in operands:
        if not isinstance(operand, Tensor):
            found.append(operand)
            continue
        device = operand.device
        if device.type != NATIVE_DEVICE or type(operand) not in (Tensor, Parameter) or (records and operand.requires_grad):
            return None
        if index is None:
            index = device.index
        elif index != device.index:
            return None
        found += (operand.dtype, operand.shape, operand.stride(), operand.data_ptr() % ALIGNMENT)
    found[0] = index
    return tuple(found)
