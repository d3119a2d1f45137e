"""Compile launches for GPUs that are not here, and read from the result what a GPU would need to run them.

The very launches that the operations make, at the shapes of the real model and at every entry of the configuration tables. What
comes back is what decides whether a configuration is sound before it ever meets a GPU: registers spilled to the stack, shared
memory, and whether the instructions are the ones the kernel was written for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .example import all_examples
from .launch import (
    COMPUTE_CAPABILITIES,
    TRITON_MISSING,
    Generation,
    Launch,
    TensorDescriptor,
    TritonUnavailable,
    is_interpreting,
)

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one launch became for one GPU.

    Args:
        name: of the case.
        generation: the GPUs it was compiled for.
        kernel: the launch's name.
        registers: per thread.
        stack_bytes: per thread, registers that did not fit.
        shared_bytes: per program.
        scratch_bytes: global memory that each launch would have to be given.
        has_wgmma: whether it multiplies with Hopper's asynchronous matrix instructions.
        has_bulk_tensor_copy: whether it loads through the tensor memory accelerator.
    """

    name: str
    generation: Generation
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    scratch_bytes: int
    has_wgmma: bool
    has_bulk_tensor_copy: bool


def compile_launch(name: str, launch: Launch, generation: Generation) -> Compiled:
    """Compile one launch as it would be on its first call, for a GPU that need not be here.

    Args:
        name: what the result calls it.
        launch: its tensors may lie on a CPU.
        generation: the GPUs to compile for.

    Returns:
        What it needs.

    Raises:
        TritonUnavailable: Triton is missing, or its interpreter is on.
    """
    if is_interpreting():
        raise TritonUnavailable("Triton was imported with TRITON_INTERPRET=1, which compiles nothing")
    if TRITON_MISSING is not None:
        raise TritonUnavailable(TRITON_MISSING)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    values = {**launch.arguments, **launch.config.blocks}
    signature, constants, attributes = _specialise(kernel, values)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
        "enable_fp_fusion": True,
    }
    target = GPUTarget("cuda", COMPUTE_CAPABILITIES[generation], 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        name=name,
        generation=generation,
        kernel=launch.name,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        scratch_bytes=compiled.metadata.global_scratch_size,
        has_wgmma="wgmma.mma_async" in ptx,
        has_bulk_tensor_copy="cp.async.bulk.tensor" in ptx,
    )


def _specialise(
    kernel: object, values: dict[str, object]
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """Types, constants and alignments of a kernel's arguments, as Triton's own launcher derives them from a call."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):  # type: ignore[attr-defined]
        value = values[parameter.name]
        signature[parameter.name] = _type_of(value, parameter.is_constexpr)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif (isinstance(value, Tensor) and value.data_ptr() % 16 == 0) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: object, is_constant: bool) -> str:
    if is_constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if TensorDescriptor is not None and isinstance(value, TensorDescriptor):
        block = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}[{block}]>"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no kernel takes a {type(value).__name__}")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the resource dump of Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {dump!r}")
    return int(usage[1]), int(usage[2])


def standard_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    """Every kernel of the hot loop at the real model's shapes, and at every other entry of its configuration table.

    Args:
        generation: whose configurations to take.

    Yields:
        A name, and the launch on CPU tensors of few rows.
    """
    for example in all_examples(generation):
        if example.operation.describe is not None:
            yield example.name, example.launch(generation)
