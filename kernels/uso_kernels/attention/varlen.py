"""Attention through torch's own variable-length FlashAttention, where this torch has it (``torch.nn.attention.varlen``)."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from uso_kernels.ragged import Ragged


def varlen_attention_missing(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    if not _torch_has_it():
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if device.type != "cuda":
        return "torch's variable-length attention runs on CUDA only"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs compute capability 8.0"
    return None


@lru_cache
def _torch_has_it() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within all sequences in one launch; operands as `uso_kernels.attention.attention` has checked them."""
    from torch.nn.attention.varlen import varlen_attn

    result = varlen_attn(
        take_tokens(q, queries),
        take_tokens(k, keys),
        take_tokens(v, keys),
        queries.token_bounds_tensor,
        keys.token_bounds_tensor,
        queries.max_length,
        keys.max_length,
    )
    assert isinstance(result, Tensor)
    return place_tokens(result, queries)


def take_tokens(x: Tensor, layout: Ragged) -> Tensor:
    """The rows that hold tokens, without padding between sequences; x itself where there is none."""
    return x if layout.token_rows is None else x.index_select(0, layout.token_rows)


def place_tokens(tokens: Tensor, layout: Ragged) -> Tensor:
    """Put tokens back where `take_tokens` found them, with zeros in the padding rows."""
    if layout.token_rows is None:
        return tokens
    return tokens.new_zeros(layout.rows, *tokens.shape[1:]).index_copy_(0, layout.token_rows, tokens)
