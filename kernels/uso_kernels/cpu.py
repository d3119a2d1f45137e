"""What the CPU computes with and out of, where that decides how something is computed best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from .ragged import TILE_ROWS
from .whole_vectors import gelu

BLOCK_NUMBERS = 128 * 1024
"""Numbers of a block of rows, for each thread: with what is made of them in float32 they stay in a core's second cache."""


def row_blocks(x: Tensor, width: int) -> Sequence[slice]:
    """The rows of a tensor in blocks that a reference of several passes computes one after another, from the cache.

    On a GPU, and where autograd records, it is all rows at once. Rows must not depend on each other, nor a number's bits on its
    place: of PyTorch's passes over numbers one by one, GELU, SiLU, the sigmoid, reciprocal roots in bfloat16 and products of
    complex numbers do not keep to that (`uso_kernels.whole_vectors`), sums, products and roots of real ones do. Every block
    begins with a tile, which is of one sequence.

    Args:
        x: [R, .], for its device and rows.
        width: numbers of a row that are computed at once.
    """
    rows = x.shape[0]
    if not x.is_cpu or torch.is_grad_enabled():
        return [slice(0, rows)]
    step = max(1, BLOCK_NUMBERS * torch.get_num_threads() // max(1, width) // TILE_ROWS) * TILE_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def sequence_rows(tile_sequence: Tensor) -> Iterator[tuple[int, slice]]:
    """Each sequence and its rows, in the order of the tiles.

    Args:
        tile_sequence: int32 [R / TILE_ROWS], the sequence of each tile of rows, on the CPU.
    """
    start = 0
    for sequence, tiles in groupby(tile_sequence.tolist()):
        stop = start + TILE_ROWS * len(list(tiles))
        yield sequence, slice(start, stop)
        start = stop


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices on this CPU by a library made for it.

    oneDNN takes them from AVX-512 on (on ARM: from the bf16 extension on). Elsewhere PyTorch's own loop computes them at an
    eighth of float32's rate, so that widening both operands, multiplying and rounding once is faster and no less exact.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache
def multiplies_int8() -> bool:
    """Whether `torch._int_mm` is exact on this CPU.

    Without VNNI oneDNN adds pairs of products in 16 bits, which saturate: sums of large numbers are then wrong, unsaid. PyTorch
    takes another way on CPUs that lack it, but not where oneDNN was told at its start to use fewer instructions than there are.
    """
    largest = torch.full((16, 64), 127, dtype=torch.int8)
    sums: Tensor = torch._int_mm(largest, largest.t())
    return bool((sums == 64 * 127**2).all())


_EXACT_COLUMNS = 1024
"""Products of int8 numbers whose sum is at most 2^24, up to which float32 has every whole number."""


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 sums of an int8 product, [M, K] and [N, K] to [M, N]."""
    if not x.is_cpu or multiplies_int8():
        sums: Tensor = torch._int_mm(x, weight.t())
        return sums
    sums = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, x.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        sums += (x[:, columns].float() @ weight[:, columns].float().t()).to(torch.int32)
    return sums


def widens(x: Tensor) -> bool:
    """Whether products of a tensor's type are best computed in float32 where it is."""
    return x.is_cpu and x.dtype == torch.bfloat16 and not multiplies_bfloat16()


def activates(x: Tensor) -> bool:
    """Whether a product of a tensor's type ends in GELU best where it is: in bfloat16, which is oneDNN's on a CPU anyway.

    Products in float32 are MKL's, which are faster than oneDNN's and know no GELU. A compiler joins the two by itself, and
    takes this one only where it has packed the weight.
    """
    if torch.compiler.is_compiling():
        return False
    return x.is_cpu and x.dtype == torch.bfloat16 and multiplies_bfloat16() and _has_product_with_gelu()


@lru_cache
def _has_product_with_gelu() -> bool:
    # Asked by doing it: oneDNN may be told at its start to use fewer instructions than the CPU has, and then lacks it.
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    try:
        product_with_gelu(x, x, x.new_zeros(1))
    except (AttributeError, RuntimeError):
        return False
    return True


def product_with_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of a product in its tanh form, [M, K] and [N, K] to [M, N], by oneDNN: its sums are not rounded before.

    It is what `torch.compile` makes of a linear layer and GELU on a CPU.
    """
    if not x.shape[1]:  # oneDNN knows no such product: every sum is 0.
        return gelu(bias).repeat(x.shape[0], 1)
    # Of the bias it reads the memory and not the stride.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), "gelu", [], "tanh")
    return y
