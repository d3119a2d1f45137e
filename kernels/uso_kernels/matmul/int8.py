"""Multiply two row-quantised int8 matrices.

    y[m, n] = x_scale[m] * weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]

2 M N K operations on tensor cores (Turing and newer have them, fp8 or not); M K + N K bytes read and 2 M N written. The sums
are exact integers: at most K * 127^2 < 2^31 for every K up to 133,000. torch's own int8 product writes the sums as int32 and
leaves the scales to another pass over 4 M N bytes; here they are applied before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uso_kernels.cpu import int8_product
from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, jit, strided, tl
from uso_kernels.operands import result_like
from uso_kernels.operation import operation

from .fp8 import check_quantized_product, scaled

MOST_COLUMNS = (2**31 - 1) // 127**2
"""Columns K up to which int32 sums cannot overflow."""


@jit
def _int8_matmul_kernel(
    x_ptr,  # int8 [M, K]
    x_scale_ptr,  # float32 [M]
    weight_ptr,  # int8 [N, K]
    weight_scale_ptr,  # float32 [N]
    bias_ptr,  # [N], or unused
    y_ptr,  # [M, N]
    m_rows,
    n_rows,
    k_columns,
    x_stride,
    weight_stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles are visited in groups of GROUP_M rows of tiles, so that neighbours in time share operands in the L2 cache.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(m_rows, BLOCK_M)
    tiles_n = tl.cdiv(n_rows, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_rows = min(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: their sums are never stored, and the loop needs no mask for them.
    x_rows = tl.minimum(rows, m_rows - 1).to(tl.int64)
    weight_rows = tl.minimum(columns, n_rows - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, k_columns, BLOCK_K):
        inside = inner < k_columns - start
        x = tl.load(x_ptrs, mask=inside[None, :], other=0)
        weight = tl.load(weight_ptrs, mask=inside[:, None], other=0)
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    row_mask = rows < m_rows
    column_mask = columns < n_rows
    x_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=column_mask, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def _tiles(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return Config(num_warps, num_stages, {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8})


# Chosen so that every generation compiles within its shared memory and without spills; not measured on a GPU yet. Few rows (the
# text stream) get small tiles, so that the chip is filled.
FEW_ROWS = 1024
CONFIGS: dict[Generation, tuple[Config, Config]] = {
    "ampere": (_tiles(64, 128, 64, 4, 3), _tiles(128, 128, 64, 8, 3)),
    "ampere_consumer": (_tiles(64, 128, 64, 4, 3), _tiles(128, 128, 64, 8, 3)),
    "ada": (_tiles(64, 128, 64, 4, 3), _tiles(128, 128, 64, 8, 3)),
    "hopper": (_tiles(64, 128, 128, 4, 4), _tiles(128, 128, 128, 8, 4)),
    "blackwell": (_tiles(64, 128, 128, 4, 3), _tiles(128, 128, 128, 8, 4)),
    "blackwell_consumer": (_tiles(64, 128, 64, 4, 3), _tiles(128, 128, 64, 8, 3)),
}
"""Configurations for at most `FEW_ROWS` rows, and for more."""


def _launch(
    generation: Generation, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor
) -> Launch:
    m_rows, n_rows = y.shape
    config = CONFIGS[generation][m_rows > FEW_ROWS]
    arguments = strided(x=x, weight=weight, y=y) | {
        "x_scale_ptr": x_scale,
        "weight_scale_ptr": weight_scale,
        "bias_ptr": x_scale if bias is None else bias,
        "m_rows": m_rows,
        "n_rows": n_rows,
        "k_columns": x.shape[1],
        "HAS_BIAS": bias is not None,
    }
    grid = (-(-m_rows // config.blocks["BLOCK_M"]) * -(-n_rows // config.blocks["BLOCK_N"]),)
    return Launch("int8_matmul", _int8_matmul_kernel, grid, arguments, config)


@operation(writes=("y",), launch=_launch)
def int8_matmul_into(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill `y`."""
    # Indifferent to how its operands are aligned, which torch._weight_int8pack_mm is not.
    y.copy_(scaled(int8_product(x, weight).float(), x_scale, weight_scale, bias))


def int8_matmul(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply activations by a weight, both int8 with a scale per row.

    Args:
        x: int8 [M, K], rows contiguous.
        x_scale: float32 [M].
        weight: int8 [N, K], rows contiguous; K and N multiples of 16.
        weight_scale: float32 [N].
        bias: [N] or None.
        dtype: of the result.
        out: [M, N] in `dtype`, where the result goes.

    Returns:
        [M, N] in `dtype`; sums are exact, scales and bias are applied in float32.

    Raises:
        ValueError: types or shapes that do not belong together, or K so large that sums could overflow.
    """
    check_quantized_product(x, x_scale, weight, weight_scale, bias, torch.int8)
    if x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"int8 sums over more than {MOST_COLUMNS} columns can overflow, got {x.shape[1]}")
    y = result_like(x, out, (x.shape[0], weight.shape[0]), dtype)
    int8_matmul_into(x, x_scale, weight, weight_scale, bias, y)
    return y


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """The product for q, k and v of a text stream and of an image stream, with a bias and without."""
    inner, columns, most = size.width, 3 * size.width, max(size.rows, FEW_ROWS + 16)
    x, weight = size.normal(most, inner, dtype=torch.int8), size.normal(columns, inner, dtype=torch.int8)
    x_scale, weight_scale = (size.normal(n, dtype=torch.float32) / (127 * inner) for n in (most, columns))
    y, bias = size.unwritten(most, columns), size.normal(columns)
    for rows, kind in ((FEW_ROWS, "few"), (most, "many")):
        for name, added in ((" bias", bias), ("", None)):
            operands = (x[:rows], x_scale[:rows], weight, weight_scale, added, y[:rows])
            yield Example(f"int8_matmul {kind} rows{name}", int8_matmul_into, operands, 2 * rows * inner * columns)
