"""Attention within each sequence of a packed batch, without masks and not causal: one function, several ways to compute it.

    out[i] = softmax(q[i] k^T / sqrt(D)) v      over the tokens of i's own sequence

4 L_q L_k C FLOPs per sequence. Queries may be fewer than keys (the last single block needs only the image rows). Each
backend is a module of its own; this one checks operands, says which can run, and chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from uso_kernels import cpu
from uso_kernels.launch import TRITON_MISSING, is_interpreting, needs_gradient
from uso_kernels.operands import FLOAT_DTYPES
from uso_kernels.ragged import Ragged

from .chunked import chunked_attention, chunked_attention_missing
from .dense import (
    batched_dense_attention,
    dense_attention,
    dense_attention_missing,
    dense_attention_refuses,
    dense_preference,
    dense_runs_on_amx,
    is_whole,
    unequal_lengths,
)
from .eight_bit import eight_bit_attention, eight_bit_attention_missing
from .flash import FLASH_ATTENTION_3, FLASH_ATTENTION_4
from .triton import attend_sequence, attention_reference, triton_attention
from .varlen import varlen_attention, varlen_attention_missing
from .xformers import xformers_attention, xformers_attention_missing

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailable",
    "attention",
    "available_backends",
    "choose_backend",
    "dense_preference",
    "prepare_attention",
    "resolve_backends",
]
Attend = Callable[[Tensor, Tensor, Tensor, Ragged, Ragged], Tensor]
LONG_SEQUENCE = 1024
"""From this length on, a sequence fills a GPU by itself and the fastest dense call wins over one launch for several."""


class BackendUnavailable(RuntimeError):
    """An attention backend was asked for by name and cannot run here; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Args:
        attend: computes it.
        missing: why it cannot run on a device, or None.
        half_only: whether it takes float16 and bfloat16 only on a GPU.
        loss: relative error that its arithmetic may add to the rounding of the operands' type, for queries and keys as large as
            a norm leaves them; 0 for all that "auto" may choose. A lossy one has no gradient.
    """

    attend: Attend
    missing: Callable[[torch.device], str | None]
    half_only: bool = False
    loss: float = 0.0


def _triton_missing(device: torch.device) -> str | None:
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if device.type == "cuda" or is_interpreting():
        return None
    return "Triton kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1"


BACKENDS = {
    "dense": Backend(dense_attention, dense_attention_missing),
    "dense_batched": Backend(batched_dense_attention, dense_attention_missing),
    "varlen": Backend(varlen_attention, varlen_attention_missing, half_only=True),
    "xformers": Backend(xformers_attention, xformers_attention_missing),
    "flash3": Backend(FLASH_ATTENTION_3.attend, FLASH_ATTENTION_3.missing, half_only=True),
    "flash4": Backend(FLASH_ATTENTION_4.attend, FLASH_ATTENTION_4.missing, half_only=True),
    "triton": Backend(triton_attention, _triton_missing, half_only=True),
    "chunked": Backend(chunked_attention, chunked_attention_missing),
    "8bit": Backend(eight_bit_attention, eight_bit_attention_missing, half_only=True, loss=0.06),
}
_DENSE = ("dense", "dense_batched")


def available_backends(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Every backend with the reason why it cannot run on a device; None for those that can.

    Args:
        device: where the tensors would be.
        dtype: of the tensors; None for any type that a backend takes.
    """
    return {name: _missing(name, torch.device(device), dtype) for name in BACKENDS}


def _missing(backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    reason = BACKENDS[backend].missing(device)
    if reason is not None or dtype is None:
        return reason
    if not _takes_dtype(backend, device, dtype):
        return f"it takes float16 and bfloat16, got {dtype}"
    return dense_attention_refuses(dtype) if backend in _DENSE and device.type == "cpu" else None


def choose_backend(device: torch.device, dtype: torch.dtype, length: int) -> str:
    """The default backend of a sequence, by its own length: its bits are the same in any company.

    On a CPU: in bfloat16 chunked matrix products where AVX-512 and no AMX multiplies them, the faster way there; else dense
    calls, which use AMX better, and which are widened where the CPU has no bfloat16 products. On a GPU: dense calls for long
    sequences, one launch for all shorter ones.

    Args:
        device: where the tensors are.
        dtype: of q, k and v.
        length: of its keys.

    Returns:
        A key of `BACKENDS`.
    """
    if device.type != "cuda":
        multiplies = dtype == torch.bfloat16 and device.type == "cpu" and cpu.multiplies_bfloat16()
        return "chunked" if multiplies and not dense_runs_on_amx() else "dense"
    if length < LONG_SEQUENCE:
        for name in ("varlen", "triton"):
            if BACKENDS[name].missing(device) is None and _takes_dtype(name, device, dtype):
                return name
    return "dense"


def _takes_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 or not BACKENDS[backend].half_only or device.type != "cuda"


def resolve_backends(backend: str, q: Tensor, queries: Ragged, keys: Ragged) -> tuple[str, ...]:
    """Turn a wish into the backends that will run.

    Args:
        backend: a key of `BACKENDS`, or "auto".
        q: the queries, for their device and dtype.
        queries: where the queries lie.
        keys: where keys and values lie.

    Returns:
        A key of `BACKENDS` for each sequence.

    Raises:
        ValueError: no such backend.
        BackendUnavailable: it cannot run on this device, dtype or these lengths.
    """
    if backend == "auto":
        return tuple(choose_backend(q.device, q.dtype, length) for length in keys.lengths)
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {['auto', *BACKENDS]}, got {backend!r}")
    reasons = available_backends(q.device, q.dtype)
    reasons["dense_batched"] = reasons["dense_batched"] or unequal_lengths(queries, keys)
    if (reason := reasons[backend]) is not None:
        runnable = [name for name, why in reasons.items() if why is None]
        raise BackendUnavailable(f"attention backend {backend!r} cannot run: {reason}; on {q.device} these can: {runnable}")
    return (backend,) * len(keys)


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, *, backend: str = "auto") -> Tensor:
    """Attend within each sequence.

    Args:
        q: [T_q, H, D], heads contiguous.
        k: [T, H, D], q's dtype.
        v: [T, H, D], q's dtype.
        queries: where each sequence's queries lie.
        keys: where its keys and values lie; as many sequences as `queries`.
        backend: a key of `BACKENDS`, or "auto" for the default of device, dtype and each sequence's length. The Triton kernel
            takes D 64 and 128.

    Returns:
        [T_q, H, D] in q's dtype; rows that belong to no token are zero.

    Raises:
        ValueError: operands that do not fit together, no such backend, or a gradient of a lossy one.
        BackendUnavailable: a backend asked for by name cannot run here.
    """
    _check_operands(q, k, v, queries, keys)
    names = resolve_backends(backend, q, queries, keys)
    if needs_gradient(q, k, v):
        if any(BACKENDS[name].loss for name in names):
            raise ValueError(f"attention backend {backend!r} rounds to 8 bits and has no gradient; call it under no_grad")
        return attention_reference(q, k, v, queries, keys)
    return _attend_by_groups(_groups(names, queries, keys), q, k, v)


_Group = tuple[str, slice, slice, Ragged, Ragged]
"""A backend, the rows of queries and of keys that it is for, and their layouts."""


def _groups(names: Sequence[str], queries: Ragged, keys: Ragged) -> list[_Group]:
    """Sequences side by side that one backend was chosen for."""
    found, first = [], 0
    for name, group in groupby(names):
        stop = first + len(tuple(group))
        rows, key_rows = (slice(layout.starts[first], layout.end(stop - 1)) for layout in (queries, keys))
        whole = stop - first == len(queries)
        layouts = (queries, keys) if whole else (queries.neighbours(first, stop), keys.neighbours(first, stop))
        found.append((name, rows, key_rows, *layouts))
        first = stop
    return found


def _attend_by_groups(groups: Sequence[_Group], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by one backend after another, each for the sequences that it was chosen for."""
    results = [
        BACKENDS[name].attend(q[rows], k[key_rows], v[key_rows], queries, keys)
        for name, rows, key_rows, queries, keys in groups
    ]
    return results[0] if len(results) == 1 else torch.cat(results)


def prepare_attention(backend: str, like: Tensor, queries: Ragged, keys: Ragged) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attention` at one place of a step: the backend is looked for once, and operands are taken as they are.

    Args:
        backend: as for `attention`.
        like: of the device and dtype of the operands.
        queries: as for `attention`.
        keys: as for `attention`.

    Returns:
        A function of q, k and v, each [., H, D] with contiguous heads and rows as the layouts say. Autograd takes `attention`.

    Raises:
        ValueError: no such backend.
        BackendUnavailable: a backend asked for by name cannot run here.
    """
    names = resolve_backends(backend, like, queries, keys)
    if torch.is_grad_enabled():
        return lambda q, k, v: attention(q, k, v, queries, keys, backend=backend)
    if set(names) == {"dense"} and is_whole(queries) and is_whole(keys) and not cpu.widens(like):
        return attend_sequence
    groups = _groups(names, queries, keys)
    return lambda q, k, v: _attend_by_groups(groups, q, k, v)


def _check_operands(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q must be [T_q, H, D] and k, v [T, H, D], got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype not in FLOAT_DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if len(queries) != len(keys):
        raise ValueError(f"queries and keys must have as many sequences, got {len(queries)} and {len(keys)}")
    if queries.rows != q.shape[0] or keys.rows != k.shape[0]:
        raise ValueError(f"the layouts have {queries.rows} and {keys.rows} rows, q and k have {q.shape[0]} and {k.shape[0]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"{name} must have contiguous heads, got strides {x.stride()}; call .contiguous()")
