"""An operation: what it computes, in plain PyTorch, and what computes the same on a GPU.

A module writes two functions of the same operands: the reference, which fills the operands that it writes, and the description
of its launch. The rest is here: an operator for torch with its CUDA kernel and its fake, and the table from which the
interpreter and the tests take every operation there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.graph import increment_version
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .launch import Generation, Launch, generation_of

OPERATIONS: dict[str, Operation] = {}
"""Every operation whose module was imported, by name."""

NATIVE_DEVICE = "cuda"
"""Type of the devices on whose tensors a call goes straight to the launch."""

Fill = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Operation:
    """Call it to fill the operands that it writes, on whatever device they are.

    Args:
        reference: the same in plain PyTorch, on any device.
        op: the operator for torch: the reference on a CPU, `native` on a GPU.
        writes: positions of the operands that it fills or changes.
        native: computes it on a GPU.
        describe: the Triton launch for a generation and operands; None where a library computes it.
    """

    reference: Fill
    op: CustomOpDef
    writes: tuple[int, ...]
    native: Fill
    describe: Callable[..., Launch] | None

    @property
    def name(self) -> str:
        """As `OPERATIONS` knows it."""
        return self.reference.__name__

    def __call__(self, *operands: object) -> None:
        """Fill the operands that it writes.

        An operator with a Triton kernel costs 57 us of a CPU's time and the launch alone 24, 270 times a step. So a call on
        CUDA tensors goes to the launch, unless something has to see the operator: autograd, a compiler, a mode that watches
        operations.
        """
        if not _is_plain(operands):
            self.op(*operands)
            return
        self.native(*operands)
        for position in self.writes:
            written = operands[position]
            # As the operator would: autograd sees that a tensor saved for backward has changed.
            if isinstance(written, Tensor) and not written.is_inference():
                increment_version(written)

    def launch(self, generation: Generation, *operands: object) -> Launch:
        """The Triton launch for a generation of GPUs; the operands may lie anywhere.

        Raises:
            TypeError: a library computes it.
        """
        if self.describe is None:
            raise TypeError(f"{self.name} is computed by a library and has no Triton kernel")
        return self.describe(generation, *operands)


def operation(
    *, writes: tuple[str, ...], launch: Callable[..., Launch] | None = None, library: Fill | None = None
) -> Callable[[Fill], Operation]:
    """Make a reference an operation.

    Args:
        writes: names of the operands that it fills or changes.
        launch: describes the Triton launch: takes the generation, then the reference's operands.
        library: in place of a launch, what computes it on a GPU: takes the reference's operands.

    Returns:
        A decorator: the operation is called as its reference is, and gives back nothing.

    Raises:
        ValueError: both a launch and a library, or neither.
    """
    if (launch is None) == (library is None):
        raise ValueError("an operation has either a launch or a library's function for a GPU")

    def run(*operands: object) -> None:
        assert launch is not None
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        # Of a type without a kernel, so that the error names it.
        wide = next((tensor for tensor in tensors if tensor.dtype == torch.float64), tensors[0])
        launch(generation_of(wide), *operands).run()

    def register(reference: Fill) -> Operation:
        op = torch.library.custom_op(f"uso_kernels::{reference.__name__}", reference, mutates_args=writes)
        native = run if library is None else library
        op.register_kernel("cuda")(native)
        op.register_fake(lambda *operands: None)  # It only writes, so tracing has nothing to make.
        names = list(inspect.signature(reference).parameters)
        made = Operation(reference, op, tuple(map(names.index, writes)), native, launch)
        OPERATIONS[made.name] = made
        return made

    return register


def _is_plain(operands: tuple[object, ...]) -> bool:
    """Whether operands are ordinary tensors of a GPU in eager mode, and nothing has to see the operator that works on them."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    records = torch.is_grad_enabled()
    for operand in operands:
        if isinstance(operand, Tensor) and (
            operand.device.type != NATIVE_DEVICE
            or type(operand) not in (Tensor, Parameter)
            or (records and operand.requires_grad)
        ):
            return False
    return True
