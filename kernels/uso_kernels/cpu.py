"""What the CPU computes with, where it decides how something is computed best."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices on this CPU by a library made for it.

    oneDNN takes them from AVX-512 on (on ARM: from the bf16 extension on). Elsewhere PyTorch's own loop computes them at an
    eighth of float32's rate, so that widening both operands, multiplying and rounding once is faster and no less exact.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens(x: Tensor) -> bool:
    """Whether products of a tensor's type are best computed in float32 where it is."""
    return x.is_cpu and x.dtype == torch.bfloat16 and not multiplies_bfloat16()
