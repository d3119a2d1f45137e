"""Attention through FlashAttention-3 and -4 where they are installed: one call per sequence.

Hopper's own kernel (package ``flash_attn_interface``) and the one for Hopper and Blackwell (``flash_attn.cute``). A call per
sequence, not one for all: both load whole blocks of keys through the tensor memory accelerator, past a sequence's end into its
neighbour's rows, whose NaN a weight of zero does not stop. Both read rows wherever they lie, so nothing is copied.
Source: FlashAttention-3 (Shah et al. 2024); FlashAttention-4 (Dao et al. 2025).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from uso_kernels.extension import extension_failure
from uso_kernels.ragged import Ragged


@dataclass(frozen=True)
class FlashAttention:
    """One of the two, as a backend.

    Args:
        title: what messages call it.
        module: where its ``flash_attn_func`` is.
        majors: first numbers of the compute capabilities that it has kernels for.
    """

    title: str
    module: str
    majors: tuple[int, ...]

    def missing(self, device: torch.device) -> str | None:
        """Why this cannot run on a device, or None."""
        if device.type != "cuda":
            return f"{self.title} runs on CUDA only"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in self.majors:
            return f"{self.title} needs compute capability {' or '.join(f'{n}.x' for n in self.majors)}, got {major}.{minor}"
        return _failure(self.module)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
        """Attend within each sequence; operands as `uso_kernels.attention.attention` has checked them."""
        function = importlib.import_module(self.module).flash_attn_func
        out = q.new_empty(q.shape)
        for i in range(len(queries)):
            span, key_span = queries.span(i), keys.span(i)
            result = function(q[span][None], k[key_span][None], v[key_span][None])
            # Some versions give the sums of the softmax as well.
            out[span] = (result[0] if isinstance(result, tuple) else result)[0]
            out[span.stop : queries.end(i)] = 0
        return out


@lru_cache
def _failure(module: str) -> str | None:
    return extension_failure(module)


FLASH_ATTENTION_3 = FlashAttention("FlashAttention-3", "flash_attn_interface", (9,))
FLASH_ATTENTION_4 = FlashAttention("FlashAttention-4", "flash_attn.cute", (9, 10))
