"""Run the Triton launches on CPU tensors through Triton's interpreter, in processes that ask for it.

Set ``TRITON_INTERPRET=1`` before anything imports triton, then call `register_cpu_launches` once: from then on every
operation of this package computes on a CPU what its kernel computes on a GPU, slowly. What the interpreter cannot round
(bfloat16: it truncates on a store and its products are garbage; float8: a carry into the exponent is lost) it computes in
float32, and PyTorch rounds the result; so bfloat16 shows the kernel's arithmetic but not its rounding inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .example import kernel_modules
from .launch import TritonUnavailable, is_interpreting
from .operation import OPERATIONS, Operation

WIDENED_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


def interpreted(operation: Operation) -> Callable[..., None]:
    """Make an operation's launch take every dtype on a CPU.

    Returns:
        A function of the operation's operands, for CPU tensors.
    """

    def run(*operands: object) -> None:
        widened = [
            operand.float() if isinstance(operand, Tensor) and operand.dtype in WIDENED_DTYPES else operand
            for operand in operands
        ]
        operation.native(*widened)
        for position in operation.writes:
            original, result = operands[position], widened[position]
            if original is not result and isinstance(original, Tensor) and isinstance(result, Tensor):
                original.copy_(result)

    return run


def register_cpu_launches() -> None:
    """Make every operation of the package run its Triton kernel, interpreted, on CPU tensors of this process.

    Raises:
        TritonUnavailable: Triton is missing, or was imported without ``TRITON_INTERPRET=1``.
    """
    if not is_interpreting():
        raise TritonUnavailable("set TRITON_INTERPRET=1 before triton is first imported, then call register_cpu_launches()")
    kernel_modules()
    for operation in OPERATIONS.values():
        if operation.describe is not None:
            operation.op.register_kernel("cpu")(interpreted(operation))
