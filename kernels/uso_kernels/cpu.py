"""What the CPU computes with and out of, where that decides how something is computed best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import TILE_ROWS

BLOCK_NUMBERS = 128 * 1024
"""Numbers of a block of rows, for each thread: with what is made of them in float32 they stay in a core's second cache."""


def row_blocks(x: Tensor, width: int) -> Sequence[slice]:
    """The rows of a tensor in blocks that a reference of several passes computes one after another, from the cache.

    On a GPU, and where autograd records, it is all rows at once. Rows must not depend on each other, nor a number's bits on its
    place: of PyTorch's passes over numbers one by one, GELU, SiLU, the sigmoid and products of complex numbers do not keep to
    that (`gelu`), sums, products and roots of real ones do. Every block begins with a tile, which is of one sequence.

    Args:
        x: [R, .], for its device and rows.
        width: numbers of a row that are computed at once.
    """
    rows = x.shape[0]
    if not x.is_cpu or torch.is_grad_enabled():
        return [slice(0, rows)]
    step = max(1, BLOCK_NUMBERS * torch.get_num_threads() // max(1, width) // TILE_ROWS) * TILE_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


_COMPLEX_VECTORS = 16
"""Complex numbers that PyTorch multiplies at a time, or a multiple of that, in every type and with every instruction set."""
_ONE_THREADS_PRODUCTS = 32768
"""Up to so many numbers one thread multiplies; more are divided evenly among as many threads as have so many each."""


def whole_vectors(x: Tensor) -> Iterator[slice]:
    """Rows of complex numbers to be multiplied at once, so that a product's bits depend on its factors alone.

    What is left of a vector at the end of a thread's part PyTorch multiplies by another formula, which differs by the last bit.
    So no part ends inside of a vector; where a head ends in one, each row is a part and has the same columns left. On a
    GPU, and where a gradient is recorded, it is all rows at once.

    Args:
        x: [R, H, N]; the other factor is [R, 1, N].
    """
    rows, numbers, threads = x.shape[0], x[:1].numel(), torch.get_num_threads()
    start, step = 0, max(1, _ONE_THREADS_PRODUCTS // max(1, numbers))
    if not x.is_cpu or x.requires_grad:
        start = rows
    elif x.shape[2] % _COMPLEX_VECTORS:
        step = 1
    elif rows // threads * numbers >= _ONE_THREADS_PRODUCTS:
        start = rows - rows % threads
    yield slice(0, start)
    for first in range(start, rows, step):
        yield slice(first, min(first + step, rows))


_VECTORS = 64
"""Numbers that PyTorch computes at a time, or a multiple of that, in every type and with every instruction set."""
_ONE_THREADS = 16384
"""Up to so many numbers one thread computes GELU; more are divided evenly among all threads."""


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, with bits that depend on each number alone.

    On a CPU, PyTorch computes whole vectors by one formula and, by another, what is left of one at the end of each thread's
    part; the two differ by the last bit. Which numbers are left depends on how many there are and on the threads. So it is
    given parts of which each thread computes whole vectors; what is left of the last one is filled up.

    Args:
        x: of any shape.
        out: of x's shape and type, where the result goes; it may be x.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x, approximate="tanh") if out is None else torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    source = x.reshape(-1)
    result = out if out is not None and out.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    target, start = result.view(-1), 0
    while (whole := _whole_vectors(source.shape[0] - start)) > 0:
        part = slice(start, start + whole)
        torch.ops.aten.gelu.out(source[part], approximate="tanh", out=target[part])
        start += whole
    left = source.shape[0] - start
    if left:
        vector = source.new_zeros(_VECTORS)
        vector[:left] = source[start:]
        target[start:] = F.gelu(vector, approximate="tanh")[:left]
    return result if out is None or out is result else out.copy_(result)


def _whole_vectors(numbers: int) -> int:
    """How many of so many numbers to compute at once, so that each thread has whole vectors."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers <= _ONE_THREADS:
        return numbers - numbers % _VECTORS
    shared = numbers - numbers % (threads * _VECTORS)
    return shared or _ONE_THREADS


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
        return F.gelu(bias, approximate="tanh").repeat(x.shape[0], 1)
    # Of the bias it reads the memory and not the stride.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), "gelu", [], "tanh")
    return y
