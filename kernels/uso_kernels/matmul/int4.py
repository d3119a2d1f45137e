"""Multiply by a weight kept in 4 bits: turn it back into floats, then an ordinary matrix product.

    weight[n, k] = scale[n, g] * code[n, k] - shift[n, g]      g = k // group, code between 0 and 15

Layout of `codes`, uint8 [N, K / 2]: the bytes of a group lie together; byte j of a group of G columns holds column j in its
low and column j + G / 2 in its high bits, so that both halves are contiguous when written. Reads N K / 2 bytes and 4 per
group, writes 2 N K (57 MB for 3072 x 9216: about 20 us of an H100's memory against 0.4 ms for the product with 5,824 rows).
int4 tensor cores do not exist on Hopper, so the product itself is a bf16 one in any case.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, jit, strided, tl
from uso_kernels.operation import operation


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """Put two 4-bit codes into each byte, in the layout above.

    Args:
        codes: uint8 [N, K], between 0 and 15.
        group: columns of a group, even; K is a multiple of it.

    Returns:
        uint8 [N, K / 2].
    """
    halves = codes.view(codes.shape[0], codes.shape[1] // group, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """Turn packed codes, uint8 [N, K / 2], back into uint8 [N, K]."""
    halves = packed.view(packed.shape[0], 2 * packed.shape[1] // group, group // 2)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


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


CONFIG = Config(num_warps=4, num_stages=1, blocks={"BLOCK_ROWS": 16})
"""On every generation: 16 rows of one group are 1 KiB in and 4 KiB out. Reasoned, not yet measured."""


def _launch(generation: Generation, packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> Launch:
    n_rows, groups = scale.shape
    arguments = strided(packed=packed, scale=scale, shift=shift, y=y) | {"n_rows": n_rows, "HALF": packed.shape[1] // groups}
    grid = (-(-n_rows // CONFIG.blocks["BLOCK_ROWS"]), groups)
    return Launch("int4_dequantize", _int4_dequantize_kernel, grid, arguments, CONFIG)


@operation(writes=("y",), launch=_launch)
def int4_dequantize_into(packed: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    """Fill `y`."""
    rows, groups = scale.shape
    group = 2 * packed.shape[1] // groups
    codes = unpack_int4(packed, group).view(rows, groups, group)
    y.copy_(codes.float().mul_(scale.float()[:, :, None]).sub_(shift.float()[:, :, None]).flatten(1))


def int4_dequantize(packed: Tensor, scale: Tensor, shift: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Turn a 4-bit weight back into numbers.

    Args:
        packed: uint8 [N, K / 2], rows contiguous, see the module for the layout.
        scale: float16 [N, K / G], G the group size: a power of two, at least 16.
        shift: float16 [N, K / G].
        dtype: of the result.

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
    y = packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype)
    int4_dequantize_into(packed, scale, shift, y)
    return y


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """The weight that makes q, k and v, in groups of 128 columns; few rows of it in smaller groups, which small models have."""
    for group in (128, 64, 32, 16):
        is_hot = group == 128
        rows, groups = 3 * size.width if is_hot else 64, size.width // group
        packed = torch.randint(0, 256, (rows, size.width // 2), dtype=torch.uint8, device=size.device)
        scale, shift = size.normal(2, rows, groups, dtype=torch.float16)
        operands = (packed, scale, shift, size.unwritten(rows, size.width))
        yield Example(f"int4_dequantize groups of {group}", int4_dequantize_into, operands, is_hot=is_hot)
