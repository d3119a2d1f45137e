"""Run the Triton launches on CPU tensors through Triton's interpreter, in processes that ask for it.

Set ``TRITON_INTERPRET=1`` before anything imports triton, then call `register_cpu_launches` once: from then on every
operation of this package computes on a CPU what its kernel computes on a GPU, slowly. What the interpreter cannot round
(bfloat16: it truncates on a store and its products are garbage; float8: a carry into the exponent is lost) it computes in
float32, and PyTorch rounds the result; so bfloat16 shows the kernel's arithmetic but not its rounding inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .example import kernel_modules
from .launch import TRITON_MISSING, TritonUnavailable, is_interpreting, jit, tl
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


@jit
def _fill_ones(out_ptr, count):
    for i in range(count):
        tl.store(out_ptr + i, 1.0)


@lru_cache
def interpreter_missing() -> str | None:
    """Why kernels cannot be interpreted in this process, or None.

    A loop to a bound that is an argument is tried: the interpreter of Triton 3.6 reads it as a number from an array of one
    element, which numpy refuses from 2.4 on.
    """
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if not is_interpreting():
        return "set TRITON_INTERPRET=1 before triton is first imported, then call register_cpu_launches()"
    import triton
    from triton.runtime.errors import InterpreterError

    out = torch.zeros(2)
    try:
        _fill_ones[(1,)](out, 2)  # type: ignore[index]
    except InterpreterError as error:
        return f"the interpreter of Triton {triton.__version__} fails with this numpy ({error}); take numpy<2.4 or triton>=3.7"
    return None if bool((out == 1).all()) else f"the interpreter of Triton {triton.__version__} computes something else"


def register_cpu_launches() -> None:
    """Make every operation of the package run its Triton kernel, interpreted, on CPU tensors of this process.

    Raises:
        TritonUnavailable: Triton is missing, was imported without ``TRITON_INTERPRET=1``, or cannot interpret with this numpy.
    """
    reason = interpreter_missing()
    if reason is not None:
        raise TritonUnavailable(reason)
    kernel_modules()
    for operation in OPERATIONS.values():
        if operation.describe is not None:
            operation.op.register_kernel("cpu")(interpreted(operation))
