"""Passes over numbers one by one, of which each of a CPU's threads computes whole vectors: bits depend on the numbers alone.

At the end of a thread's part PyTorch computes what is left of a vector by another formula, which differs by the last bit. Which
numbers are left depends on how many there are and on the threads: on a row's company.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

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
