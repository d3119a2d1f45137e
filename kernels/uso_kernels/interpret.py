"""Run the Triton launches on CPU tensors through Triton's interpreter, in processes that ask for it.

Set ``TRITON_INTERPRET=1`` before anything imports triton, then call `register_cpu_launches` once: from then on every
operation of this package computes on a CPU what its kernel computes on a GPU, slowly. What the interpreter cannot round
(bfloat16: it truncates on a store and its products are garbage; float8: a carry into the exponent is lost) it computes in
float32, and PyTorch rounds the result; so bfloat16 shows the kernel's arithmetic but not its rounding inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from . import (
    euler_update,
    gated_residual,
    gelu_concat,
    int4_matmul,
    int8_matmul,
    layer_norm_modulate,
    qk_norm_rope,
    quantize_rows,
    split_streams,
    triton_attention,
)
from .launch import TritonUnavailable, is_interpreting, jit, tl

WIDENED_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
LAUNCHES = (
    (quantize_rows.quantize_rows_op, quantize_rows._launch),
    (layer_norm_modulate.layer_norm_modulate_op, layer_norm_modulate._launch),
    (gated_residual.gated_residual_op, gated_residual._launch),
    (qk_norm_rope.qk_norm_rope_op, qk_norm_rope._launch),
    (split_streams.split_streams_op, split_streams._launch),
    (gelu_concat.gelu_concat_op, gelu_concat._launch),
    (int8_matmul.int8_matmul_op, int8_matmul._launch),
    (int4_matmul.int4_dequantize_op, int4_matmul._launch),
    (euler_update.euler_update_op, euler_update._launch),
    (triton_attention.triton_attention_op, triton_attention._launch),
)


def mutated_arguments(operation: CustomOpDef) -> frozenset[str]:
    """Names of the arguments that an operation writes to."""
    arguments = operation._opoverload._schema.arguments
    return frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def interpreted(launch: Callable[..., None], mutated: frozenset[str]) -> Callable[..., None]:
    """Make a launch take every dtype on a CPU.

    Args:
        launch: fills some of its arguments.
        mutated: the names of those.

    Returns:
        The same function of the same arguments, for CPU tensors.
    """
    signature = inspect.signature(launch)

    def run(*args: object, **kwargs: object) -> None:
        bound = signature.bind(*args, **kwargs)
        originals = {
            name: value
            for name, value in bound.arguments.items()
            if isinstance(value, Tensor) and value.dtype in WIDENED_DTYPES
        }
        bound.arguments.update({name: value.float() for name, value in originals.items()})
        launch(*bound.args, **bound.kwargs)
        for name in originals.keys() & mutated:
            originals[name].copy_(bound.arguments[name])

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
    for operation, launch in LAUNCHES:
        operation.register_kernel("cpu")(interpreted(launch, mutated_arguments(operation)))
