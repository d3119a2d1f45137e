"""Passes over numbers one by one, of which each of a CPU's threads computes whole vectors: bits depend on the numbers alone.

At the end of a thread's part PyTorch computes what is left of a vector by another formula, which differs by the last bit. Which
numbers are left depends on how many there are and on the threads: on a row's company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_COMPLEX_VECTORS = 16
"""Complex numbers that PyTorch multiplies at a time, or a multiple of that, in every type and with every instruction set."""
_ONE_THREADS = 32768
"""Up to so many numbers one thread computes; more are divided evenly among as many threads as have so many each."""


def whole_vectors(x: Tensor) -> Iterator[slice]:
    """Rows of complex numbers to be multiplied at once, so that a product's bits depend on its factors alone.

    What is left of a vector at the end of a thread's part PyTorch multiplies by another formula, which differs by the last bit.
    So no part ends inside of a vector; where a head ends in one, each row is a part and has the same columns left. On a
    GPU, and where a gradient is recorded, it is all rows at once.

    Args:
        x: [R, H, N]; the other factor is [R, 1, N].
    """
    rows, numbers, threads = x.shape[0], x[:1].numel(), torch.get_num_threads()
    start, step = 0, max(1, _ONE_THREADS // max(1, numbers))
    if not x.is_cpu or x.requires_grad:
        start = rows
    elif x.shape[2] % _COMPLEX_VECTORS:
        step = 1
    elif rows // threads * numbers >= _ONE_THREADS:
        start = rows - rows % threads
    yield slice(0, start)
    for first in range(start, rows, step):
        yield slice(first, min(first + step, rows))


_VECTORS = 64
"""Numbers that PyTorch computes at a time, or a multiple of that, in every type and with every instruction set."""
_ONE_THREADS_GELU = 16384
"""Up to so many numbers one thread computes GELU; more are divided evenly among all threads."""
Pass = Callable[[Tensor, Tensor | None], Tensor]
"""One of PyTorch's passes over numbers one by one, into new memory or into the second argument, which may be the first."""


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, with bits that depend on each number alone.

    On a CPU, PyTorch computes whole vectors by one formula and, by another, what is left of one at the end of each thread's
    part; the two differ by the last bit. Which numbers are left depends on how many there are and on the threads. So it is
    given parts of which each thread computes whole vectors; what is left of the last one is filled up. Where a gradient is
    recorded it is PyTorch's, all at once.

    Args:
        x: of any shape.
        out: of x's shape and type, where the result goes; it may be x.
    """
    return _by_whole_vectors(_gelu, _whole_for_gelu, x, out)


def silu(x: Tensor) -> Tensor:
    """SiLU, x times its sigmoid, with bits that depend on each number alone, as `gelu` has them; x of any shape."""
    return _by_whole_vectors(_silu, _whole_vectors, x, None)


def _gelu(x: Tensor, out: Tensor | None) -> Tensor:
    return F.gelu(x, approximate="tanh") if out is None else torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def _silu(x: Tensor, out: Tensor | None) -> Tensor:
    return F.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out)


def _by_whole_vectors(compute: Pass, whole_of: Callable[[int], int], x: Tensor, out: Tensor | None) -> Tensor:
    if not x.is_cpu or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return compute(x, out)
    source = x.reshape(-1)
    result = out if out is not None and out.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    target, start = result.view(-1), 0
    while (whole := whole_of(source.shape[0] - start)) > 0:
        part = slice(start, start + whole)
        compute(source[part], target[part])
        start += whole
    left = source.shape[0] - start
    if left:
        vector = source.new_zeros(_VECTORS)
        vector[:left] = source[start:]
        target[start:] = compute(vector, None)[:left]
    return result if out is None or out is result else out.copy_(result)


def _whole_for_gelu(numbers: int) -> int:
    """How many of so many numbers to compute at once, so that each thread has whole vectors; 0 where there is none."""
    threads = torch.get_num_threads()
    if threads == 1 or numbers <= _ONE_THREADS_GELU:
        return numbers - numbers % _VECTORS
    shared = numbers - numbers % (threads * _VECTORS)
    return shared or _ONE_THREADS_GELU


def _whole_vectors(numbers: int) -> int:
    """The same for a pass that PyTorch divides as most."""
    threads = torch.get_num_threads()
    if numbers // threads >= _ONE_THREADS:
        return numbers - numbers % (threads * _VECTORS)
    return numbers - numbers % (_ONE_THREADS if numbers > _ONE_THREADS else _VECTORS)
