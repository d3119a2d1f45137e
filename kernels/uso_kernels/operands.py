"""Checks of what is handed to a kernel: each error says what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import TILE_ROWS

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(name: str, tensor: Tensor, *, width: int | None = None, like: Tensor | None = None) -> None:
    """Check a float matrix whose rows may be strided but whose columns are contiguous.

    Args:
        name: what the error calls it.
        tensor: to be [rows, width].
        width: expected columns, if known.
        like: a tensor whose dtype and device it must share.

    Raises:
        ValueError: wrong rank, width, dtype, device or column stride.
    """
    if tensor.ndim != 2 or (width is not None and tensor.shape[1] != width):
        raise ValueError(f"{name} must be [rows, {'columns' if width is None else width}], got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous columns, got strides {tensor.stride()}; call .contiguous()")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise ValueError(f"{name} must be {like.dtype} on {like.device} like the rest, got {tensor.dtype} on {tensor.device}")


def check_tiles(tile_sequence: Tensor, rows: int, device: torch.device) -> None:
    """Check the table that says which sequence each tile of rows belongs to.

    Raises:
        ValueError: a number of rows that is not whole tiles, or a table of another length, dtype or device.
    """
    if rows < TILE_ROWS or rows % TILE_ROWS:
        raise ValueError(f"packed rows must be a positive multiple of {TILE_ROWS}, got {rows}")
    if tile_sequence.ndim != 1 or tile_sequence.shape[0] != rows // TILE_ROWS:
        raise ValueError(f"tile_sequence must be [{rows // TILE_ROWS}] for {rows} rows, got shape {tuple(tile_sequence.shape)}")
    if tile_sequence.dtype != torch.int32 or tile_sequence.device != device or not tile_sequence.is_contiguous():
        raise ValueError(
            f"tile_sequence must be contiguous int32 on {device}, got {tile_sequence.dtype} on {tile_sequence.device}"
        )


def check_row_index(name: str, index: Tensor, rows: int | None, device: torch.device) -> None:
    """Check a table of row numbers.

    Raises:
        ValueError: another length, dtype or device.
    """
    if index.ndim != 1 or (rows is not None and index.shape[0] != rows):
        raise ValueError(f"{name} must be [{'rows' if rows is None else rows}], got shape {tuple(index.shape)}")
    if index.dtype != torch.int64 or index.device != device or not index.is_contiguous():
        raise ValueError(f"{name} must be contiguous int64 on {device}, got {index.dtype} on {index.device}")


def result_like(
    x: Tensor, out: Tensor | None, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor a result goes to: a new contiguous one, or the caller's after a check. Shape and dtype are x's by default.

    Raises:
        ValueError: the caller's has another shape, dtype or device, or strided columns.
    """
    shape, dtype = tuple(x.shape) if shape is None else shape, x.dtype if dtype is None else dtype
    if out is None:
        return x.new_empty(shape, dtype=dtype)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out must be {dtype} of shape {shape} on {x.device}, got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if out.ndim and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have contiguous columns, got strides {out.stride()}")
    return out
