"""Attention in 8 bits: a lossy backend, for whoever asks for it. `triton_eight_bit` says what is computed.

In front of the products are three launches that make the 8-bit operands: for each number of q and of k two bytes are read and
one is written, for each of v four are read (twice, once for the scales) and one is written. At T tokens of width C that is
11 T C bytes, and 3 T C bytes of memory. On a CPU all of it is plain PyTorch, slow and as far off as on a GPU, so that it can be
judged there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.launch import kernels_missing
from uso_kernels.ragged import Ragged

from .quantize_heads import quantize_heads
from .quantize_values import quantize_values
from .triton_eight_bit import eight_bit_attention_into


def eight_bit_attention_missing(device: torch.device) -> str | None:
    """Why this cannot run on a device, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "8-bit attention runs on CUDA, and on a CPU to be judged"
    reason = kernels_missing(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"8-bit floats need a GPU of compute capability 8.9 (Ada) or later, this one has {major}.{minor}"
    if major in (10, 11):
        return f"Triton has no fast products of 8-bit integers for compute capability {major}.{minor}"
    return None


def eight_bit_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within each sequence; operands as `uso_kernels.attention.attention` has checked them."""
    out = q.new_empty(q.shape)
    operands = (*quantize_heads(q, k), *quantize_values(v, keys))
    bounds = (queries.bounds_tensor, queries.lengths_tensor, keys.bounds_tensor, keys.lengths_tensor)
    eight_bit_attention_into(*operands, *bounds, queries.max_capacity, out)
    return out
