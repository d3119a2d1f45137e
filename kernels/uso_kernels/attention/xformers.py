"""Attention through xFormers with a block-diagonal mask, where xFormers is installed."""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
from torch import Tensor

from uso_kernels.extension import extension_failure, one_line
from uso_kernels.ragged import Ragged

from .varlen import place_tokens, take_tokens


def xformers_attention_missing(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    return _failure() if device.type == "cuda" else "xformers has no attention for CPUs"


@lru_cache
def _failure() -> str | None:
    """Why xFormers cannot be used on a GPU, or None; imports it."""
    reason = extension_failure("xformers.ops")
    if reason is not None:
        return reason
    # Built for another CUDA it imports all the same, without its kernels, and keeps the reason to itself.
    error = getattr(importlib.import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    return None if error is None else f"xformers cannot load its kernels: {one_line(error)}"


@lru_cache(maxsize=32)
def _mask(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device) -> object:
    """The mask of a batch, made once: it copies lengths to the device."""
    # By name, because it is never a dependency: this package imports torch and triton only.
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask: object = bias.BlockDiagonalMask.from_seqlens(list(query_lengths), list(key_lengths), device=device)
    return mask


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within all sequences in one launch; operands as `uso_kernels.attention.attention` has checked them."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    tokens = (take_tokens(x, layout)[None] for x, layout in ((q, queries), (k, keys), (v, keys)))
    mask = _mask(queries.lengths, keys.lengths, q.device)
    return place_tokens(attend(*tokens, attn_bias=mask)[0], queries)
