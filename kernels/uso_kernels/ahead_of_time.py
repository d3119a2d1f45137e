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

from .euler_update import euler_update_launch
from .gated_residual import gated_residual_launch
from .gelu_concat import gelu_concat_launch
from .int4_matmul import int4_dequantize_launch
from .int8_matmul import FEW_ROWS, int8_matmul_launch
from .launch import (
    COMPUTE_CAPABILITIES,
    TRITON_MISSING,
    Generation,
    Launch,
    TensorDescriptor,
    TritonUnavailable,
    is_interpreting,
)
from .layer_norm_modulate import layer_norm_modulate_launch
from .qk_norm_rope import qk_norm_rope_launch
from .quantize_rows import quantize_rows_launch
from .ragged import Ragged
from .split_streams import split_streams_launch
from .triton_attention import TMA_GENERATIONS, triton_attention_launch

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
FP8_CAPABILITY = 89
"""The first compute capability for which Triton has float8_e4m3fn."""
_ROWS = 64


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


def quantized_dtypes(generation: Generation) -> tuple[torch.dtype, ...]:
    """The 8-bit types that Triton has on a generation."""
    has_fp8 = COMPUTE_CAPABILITIES[generation] >= FP8_CAPABILITY
    return (torch.int8, torch.float8_e4m3fn) if has_fp8 else (torch.int8,)


def standard_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    """Every kernel of the hot loop at the real model's shapes, and at every other entry of its configuration table.

    Args:
        generation: whose configurations to take.

    Yields:
        A name, and the launch on CPU tensors of few rows.
    """
    yield from _norm_launches(generation)
    yield from _row_launches(generation)
    yield from _qk_launches(generation)
    yield from _product_launches(generation)
    yield from _euler_launches(generation)
    yield from _attention_launches(generation)


def _endings(generation: Generation, width: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Results of a row-wise kernel: bfloat16, and each 8-bit type with its row scales."""
    yield "bf16", torch.empty(_ROWS, width, dtype=torch.bfloat16), None
    for dtype in quantized_dtypes(generation):
        yield str(dtype).removeprefix("torch."), torch.empty(_ROWS, width, dtype=dtype), torch.empty(_ROWS)


def _norm_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    tiles = torch.zeros(_ROWS // 16, dtype=torch.int32)
    for width in (3072, 256, 1024, 2048, 8192, 16384):
        x, y, total = (torch.empty(_ROWS, width, dtype=torch.bfloat16) for _ in range(3))
        gate, shift, scale = torch.empty(1, 3, width, dtype=torch.bfloat16).unbind(1)
        for ending, out, scales in _endings(generation, width):
            if width != 3072 and scales is not None:
                continue
            norm = layer_norm_modulate_launch(x, shift, scale, tiles, 1e-6, out, scales, generation)
            yield f"layer_norm_modulate {width} {ending}", norm
            gated = gated_residual_launch(x, y, gate, shift, scale, tiles, 1e-6, total, out, scales, generation)
            yield f"gated_residual norm {width} {ending}", gated
    plain = gated_residual_launch(x, y, gate, None, None, tiles, 0.0, total, None, None, generation)
    yield f"gated_residual {width}", plain


def _row_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    rows = torch.arange(_ROWS // 2)
    for width in (3072, 15360):
        for ending, out, scales in _endings(generation, width):
            attended = torch.empty(_ROWS, width // 5, dtype=torch.bfloat16)
            hidden = torch.empty(_ROWS, width - width // 5, dtype=torch.bfloat16)
            alone = torch.empty(_ROWS, width, dtype=torch.bfloat16)
            if width == 15360:
                yield f"gelu_concat {width} {ending}", gelu_concat_launch(attended, hidden, out, scales, generation)
            else:
                yield f"gelu_concat alone {width} {ending}", gelu_concat_launch(None, alone, out, scales, generation)
                text, image = out.chunk(2)
                text_scales, image_scales = (None, None) if scales is None else scales.chunk(2)
                split = split_streams_launch(alone, rows, rows, text, image, text_scales, image_scales, generation)
                yield f"split_streams {ending}", split
            if scales is not None:
                yield f"quantize_rows {width} {ending}", quantize_rows_launch(alone, out, scales, generation)


def _qk_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    for heads, head_dim, rows in ((24, 128, torch.arange(_ROWS)), (24, 128, None), (8, 64, None)):
        q, k, v = (torch.empty(_ROWS, heads, head_dim, dtype=torch.bfloat16) for _ in range(3))
        qkv = torch.empty(_ROWS, 3 * heads * head_dim, dtype=torch.bfloat16)
        weight, turn = torch.empty(head_dim, dtype=torch.bfloat16), torch.empty(_ROWS, head_dim // 2)
        launch = qk_norm_rope_launch(qkv, weight, weight, turn, turn, rows, q, k, v, 1e-6, generation)
        yield f"qk_norm_rope {head_dim} {'joint' if rows is None else 'scattered'}", launch


def _product_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    x, weight = torch.empty(FEW_ROWS + 16, 3072, dtype=torch.int8), torch.empty(9216, 3072, dtype=torch.int8)
    x_scale, weight_scale = torch.empty(len(x)), torch.empty(len(weight))
    y, bias = torch.empty(len(x), len(weight), dtype=torch.bfloat16), torch.empty(len(weight), dtype=torch.bfloat16)
    for rows in (FEW_ROWS, len(x)):
        for name, added in ((" bias", bias), ("", None)):
            operands = x[:rows], x_scale[:rows], weight, weight_scale, added, y[:rows]
            yield f"int8_matmul {rows} rows{name}", int8_matmul_launch(*operands, generation)
    for group in (128, 64, 32, 16):
        packed, result = torch.empty(_ROWS, 1536, dtype=torch.uint8), torch.empty(_ROWS, 3072, dtype=torch.bfloat16)
        scale, shift = torch.empty(2, _ROWS, 3072 // group, dtype=torch.float16).unbind(0)
        yield f"int4_dequantize groups of {group}", int4_dequantize_launch(packed, scale, shift, result, generation)


def _euler_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    latents, guided = torch.empty(2, _ROWS, 64).unbind(0)
    velocity, delta = torch.empty(2 * _ROWS, 64, dtype=torch.bfloat16), torch.empty(_ROWS)
    yield "euler_update", euler_update_launch(latents, velocity, delta, None, None, guided, generation)
    negative = torch.arange(_ROWS)
    yield "euler_update guided", euler_update_launch(latents, velocity, delta, negative, delta, guided, generation)


def _attention_launches(generation: Generation) -> Iterator[tuple[str, Launch]]:
    layout = Ragged.pack([_ROWS])
    bounds, lengths = layout.bounds_tensor, layout.lengths_tensor
    for head_dim in (64, 128):
        q, k, v, out = (torch.empty(_ROWS, 24, head_dim, dtype=torch.bfloat16) for _ in range(4))
        # A head stride other than D has no descriptor and takes the pointer variant, which older GPUs always take.
        strided = torch.empty(_ROWS, 24, 2 * head_dim, dtype=torch.bfloat16)[:, :, :head_dim]
        queries = {"": q, " strided": strided} if generation in TMA_GENERATIONS else {"": q}
        for kind, query in queries.items():
            launch = triton_attention_launch(
                query, k, v, bounds, lengths, bounds, lengths, layout.max_capacity, out, generation
            )
            yield f"attention {head_dim}{kind}", launch
