"""Attention through `scaled_dot_product_attention`: one call per sequence, or one for all where their lengths are equal.

On Hopper and Blackwell its cuDNN backend is asked for first. On Hopper that is torch's own first choice from 2.11 on; its next,
FlashAttention-2, is 1.7 to 2.3 times slower (transformers PR 48163).

On a CPU without bfloat16 products (`uso_kernels.cpu`) such operands are widened, sequence by sequence.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from uso_kernels.cpu import widens
from uso_kernels.ragged import Ragged

from .triton import attend_sequence, attention_reference

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention_missing(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None: it runs everywhere."""
    return None


@lru_cache
def dense_runs_on_amx() -> bool:
    """Whether bfloat16 products inside dense attention run on this CPU's AMX tiles."""
    return _cpu_has_amx() and not _is_limited_below_amx()


def dense_attention_refuses(dtype: torch.dtype) -> str | None:
    """Why this cannot run on the CPU in a dtype, or None."""
    if dtype == torch.bfloat16 and _cpu_has_amx() and _is_limited_below_amx():
        return "PyTorch's bfloat16 attention needs AVX-512 on a CPU with AMX, which ATEN_CPU_CAPABILITY switches off"
    return None


def _cpu_has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _is_limited_below_amx() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


class _CudnnFirst:
    """The process's order of backends with cuDNN before the others, while at least one thread is within.

    The order belongs to the process, so the first thread to enter sets it and the last one to leave gives back what was there:
    `sdpa_kernel` in two threads ends it for one while it is within, and may leave it behind. Which backends are enabled, which
    that sets too, is left alone.
    """

    def __init__(self) -> None:
        self._lock, self._within, self._before = threading.Lock(), 0, list[int]()

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = torch._C._get_sdp_priority_order()
                first = [backend.value for backend in _CUDNN_FIRST]
                torch._C._set_sdp_priority_order([*first, *(place for place in self._before if place not in first)])
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                torch._C._set_sdp_priority_order(self._before)

    def leave_behind(self) -> None:
        """In a forked child: those within stayed in the parent, and so did whoever holds the lock."""
        if self._within:
            torch._C._set_sdp_priority_order(self._before)
        self._lock, self._within = threading.Lock(), 0


_cudnn_first = _CudnnFirst()
if hasattr(os, "register_at_fork"):  # Windows forks nothing.
    os.register_at_fork(after_in_child=_cudnn_first.leave_behind)


def dense_preference(device: torch.device) -> AbstractContextManager[object]:
    """Within it, dense attention on a device asks for cuDNN first where it is the fastest; so does other threads' meanwhile.

    A step enters it once, around all its blocks, and each call within it again, which costs next to nothing.
    """
    if device.type != "cuda" or _capability(device)[0] not in (9, 10):
        return nullcontext()
    # A compiler knows torch's own.
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True) if torch.compiler.is_compiling() else _cudnn_first


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within each sequence, one after another; operands as `uso_kernels.attention.attention` has checked them."""
    if not widens(q):
        with dense_preference(q.device):
            return attention_reference(q, k, v, queries, keys)
    out = q.new_empty(q.shape)
    for i in range(len(queries)):
        span, key_span = queries.span(i), keys.span(i)
        out[span] = attend_sequence(q[span].float(), k[key_span].float(), v[key_span].float())
        out[span.stop : queries.end(i)] = 0
    return out


def is_whole(layout: Ragged) -> bool:
    """Whether a packed tensor is one sequence without padding rows."""
    return len(layout) == 1 and not layout.has_padding


def unequal_lengths(queries: Ragged, keys: Ragged) -> str | None:
    """Why one dense call cannot serve these sequences, or None."""
    for name, layout in (("queries", queries), ("keys", keys)):
        capacities = {layout.end(i) - start for i, start in enumerate(layout.starts)}
        if len(set(layout.lengths)) > 1 or len(capacities) > 1:
            return f"{name} have lengths {sorted(set(layout.lengths))}, one dense call needs equal ones"
    return None


def batched_dense_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within all sequences at once; their lengths are equal."""
    count = len(queries)
    q_batch = q.unflatten(0, (count, -1))[:, : queries.lengths[0]].transpose(1, 2)
    k_batch, v_batch = (x.unflatten(0, (count, -1))[:, : keys.lengths[0]].transpose(1, 2) for x in (k, v))
    with dense_preference(q.device):
        result = F.scaled_dot_product_attention(q_batch, k_batch, v_batch).transpose(1, 2)
    if not queries.has_padding:
        return result.reshape(q.shape)
    out = q.new_empty(q.shape)
    rows = out.unflatten(0, (count, -1))
    rows[:, : queries.lengths[0]] = result
    rows[:, queries.lengths[0] :] = 0
    return out
