"""Multiply by a weight kept in 4 bits: dequantise it into scratch memory, then an ordinary matrix product.

    weight[n, k] = scale[n, g] * code[n, k] - shift[n, g]      g = k // group, code between 0 and 15

Layout of `codes`, uint8 [N, K / 2]: the bytes of a group lie together; byte j of a group of G columns holds column j in its
low and column j + G / 2 in its high bits, so that both halves are contiguous when written. Reads N K / 2 bytes and 4 per
group, writes 2 N K (57 MB for 3072 x 9216: about 20 us of an H100's memory against 0.4 ms for the product with 5,824 rows).
int4 tensor cores do not exist on Hopper, so the product itself is a bf16 one in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Config, Generation, Launch, generation_of, jit, tl
from .linear import linear
from .operands import result_like
from .ragged import Ragged
from .scratch import Scratch, new_memory


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """Put two 4-bit codes into each byte, in the layout above.

    Args:
        codes: uint8 [N, K], between 0 and 15.
        group: columns of a group, even; K is a multiple of it.

    Returns:
        uint8 [N, K / 2].
    """
    halves = codes.view(codes.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """Turn packed codes, uint8 [N, K / 2], back into uint8 [N, K]."""
    halves = packed.view(packed.shape[0], -1, group // 2)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


def int4_dequantize_reference(packed: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch version of `int4_dequantize`, with the same arguments."""
    groups = scale.shape[1]
    group = 2 * packed.shape[1] // groups
    codes = unpack_int4(packed, group).view(packed.shape[0], groups, group)
    wide = codes.float().mul_(scale.float()[:, :, None]).sub_(shift.float()[:, :, None])
    return wide.flatten(1).to(dtype)


@jit
def _int4_dequantize_kernel(
    packed_ptr,  # uint8 [N, K / 2]
    scale_ptr,  # float16 [N, groups]
    shift_ptr,  # float16 [N, groups]
    y_ptr,  # [N, K]
    n_rows,
    packed_stride,
    scale_stride,
    shift_stride,
    y_stride,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    group = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = rows < n_rows
    columns = tl.arange(0, HALF)
    mask = inside[:, None] & (columns >= 0)[None, :]
    codes = tl.load(packed_ptr + rows[:, None] * packed_stride + group * HALF + columns[None, :], mask=mask, other=0)
    scale = tl.load(scale_ptr + rows * scale_stride + group, mask=inside, other=0.0).to(tl.float32)[:, None]
    shift = tl.load(shift_ptr + rows * shift_stride + group, mask=inside, other=0.0).to(tl.float32)[:, None]
    low = (codes & 15).to(tl.float32) * scale - shift
    high = (codes >> 4).to(tl.float32) * scale - shift
    y_ptrs = y_ptr + rows[:, None] * y_stride + group * (2 * HALF) + columns[None, :]
    tl.store(y_ptrs, low.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptrs + HALF, high.to(y_ptr.dtype.element_ty), mask=mask)


# Memory-bound and the same on every generation: 16 rows of one group are 1 KiB in and 4 KiB out. Reasoned, not yet measured.
CONFIG = Config(num_warps=4, num_stages=1, blocks={"BLOCK_ROWS": 16})
CONFIGS: dict[Generation, Config] = {
    "ampere": CONFIG,
    "ampere_consumer": CONFIG,
    "ada": CONFIG,
    "hopper": CONFIG,
    "blackwell": CONFIG,
    "blackwell_consumer": CONFIG,
}


def int4_dequantize_launch(packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor, generation: Generation) -> Launch:
    """Describe the launch that fills `y`."""
    n_rows, groups = scale.shape
    config = CONFIGS[generation]
    arguments = {
        "packed_ptr": packed,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "y_ptr": y,
        "n_rows": n_rows,
        "packed_stride": packed.stride(0),
        "scale_stride": scale.stride(0),
        "shift_stride": shift.stride(0),
        "y_stride": y.stride(0),
        "HALF": packed.shape[1] // groups,
    }
    grid = (-(-n_rows // config.blocks["BLOCK_ROWS"]), groups)
    return Launch("int4_dequantize", _int4_dequantize_kernel, grid, arguments, config)


def _launch(packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    int4_dequantize_launch(packed, scale, shift, y, generation_of(packed)).run()


@torch.library.custom_op("uso_kernels::int4_dequantize", mutates_args=("y",))
def int4_dequantize_op(packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    """Fill `y`."""
    y.copy_(int4_dequantize_reference(packed, scale, shift, y.dtype))


int4_dequantize_op.register_kernel("cuda")(_launch)


@int4_dequantize_op.register_fake
def _(packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    pass


def int4_dequantize(
    packed: Tensor, scale: Tensor, shift: Tensor, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Turn a 4-bit weight back into numbers.

    Args:
        packed: uint8 [N, K / 2], rows contiguous, see the module for the layout.
        scale: float16 [N, K / G], G the group size: a power of two, at least 16.
        shift: float16 [N, K / G].
        dtype: of the result.
        out: [N, K], where the result goes.

    Returns:
        [N, K] in `dtype`, computed in float32.

    Raises:
        ValueError: types or shapes that do not belong together.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.stride(1) != 1:
        raise ValueError(f"packed must be a uint8 matrix with contiguous rows, got {packed.dtype} {tuple(packed.shape)}")
    rows = packed.shape[0]
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.dtype != torch.float16 or tensor.ndim != 2 or tensor.shape != scale.shape or len(tensor) != rows:
            raise ValueError(f"{name} must be float16 [{rows}, groups], got {tensor.dtype} {tuple(tensor.shape)}")
    groups = scale.shape[1]
    half, rest = divmod(packed.shape[1], groups) if groups else (0, 1)
    if rest or half < 8 or half & (half - 1):
        raise ValueError(f"{2 * packed.shape[1]} columns in {groups} groups: a group must be a power of two of at least 16")
    y = result_like(packed, out, (packed.shape[0], 2 * packed.shape[1]), dtype)
    int4_dequantize_op(packed, scale, shift, y)
    return y


def int4_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    *,
    sequences: Ragged | None = None,
    out: Tensor | None = None,
    scratch: Scratch = new_memory,
) -> Tensor:
    """Multiply activations [..., K] by a 4-bit weight; the weight is rounded to x's dtype in scratch memory.

    Args:
        x: [..., K], float.
        packed: see `int4_dequantize`.
        scale: see `int4_dequantize`.
        shift: see `int4_dequantize`.
        bias: [N] in x's dtype, or None.
        sequences: where the sequences of a packed x lie, each of which is a product of its own (see `uso_kernels.linear`).
        out: [M, N], where the result goes; x is then [M, K].
        scratch: lends the memory of the dequantised weight.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: types or shapes that do not belong together.
    """
    if x.shape[-1] != 2 * packed.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {2 * packed.shape[-1]}")
    weight = scratch("weight", (packed.shape[0], 2 * packed.shape[1]), x)
    return linear(x, int4_dequantize(packed, scale, shift, dtype=x.dtype, out=weight), bias, sequences=sequences, out=out)
