"""What PyTorch computes on GPUs alone, or otherwise on a CPU, for tensors of a simulated GPU.

Each checks what PyTorch's own checks on a GPU before it computes the same in plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = (torch.bfloat16, torch.float16)


def _addmm_activation(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool = False) -> Tensor:
    """A product that ends in GELU: in its tanh form, which a GPU takes and a CPU does not."""
    assert use_gelu
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


def _addmm_activation_out(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool = False, out: Tensor) -> Tensor:
    return out.copy_(_addmm_activation(bias, x, weight, use_gelu=use_gelu))


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor, most: int, most_keys: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention over sequences laid end to end, [T, H, D]."""
    for x in (query, key, value):
        assert x.dtype in HALF, f"FlashAttention only supports fp16 and bf16, got {x.dtype}"
        assert x.stride(-1) == 1, "it must have a contiguous last dimension"
        assert x.shape[-1] % 8 == 0, "head dimension must be a multiple of 8"
    for ends, longest, x in ((bounds, most, query), (key_bounds, most_keys, key)):
        assert ends.dtype == torch.int32 and ends.is_contiguous()
        assert longest == int(ends.diff().max()) and int(ends[-1]) == x.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype)
    for (start, stop), (first, last) in zip(*map(_spans, (bounds, key_bounds)), strict=True):
        q, k, v = (
            x[rows].transpose(0, 1)
            for x, rows in ((query, slice(start, stop)), (key, slice(first, last)), (value, slice(first, last)))
        )
        out[start:stop] = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    return out, torch.empty(0), torch.empty(0)


def _spans(bounds: Tensor) -> list[tuple[int, int]]:
    numbers: list[int] = torch._C.TensorBase.tolist(bounds)  # As a kernel reads them: nobody waits.
    return list(pairwise(numbers))


def _scaled_mm_v2(
    x: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    recipes: Sequence[int],
    swizzles: Sequence[int],
    weight_scales: Sequence[Tensor],
    weight_recipes: Sequence[int],
    weight_swizzles: Sequence[int],
    bias: Tensor | None,
    dtype: torch.dtype,
    contraction: Sequence[int] = (),
    use_fast_accum: bool = False,
    *,
    out: Tensor,
) -> Tensor:
    """A row-wise product in 8-bit floats, as PyTorch's of Hopper takes it."""
    (scale,), (weight_scale,) = scales, weight_scales
    (rows, inner), columns = x.shape, weight.shape[1]
    assert x.dtype == weight.dtype == torch.float8_e4m3fn
    assert x.stride(1) == 1 and x.stride(0) >= inner, "x must be row-major"
    assert weight.stride(0) == 1 and weight.stride(1) >= inner, "the weight must be column-major"
    assert inner % 16 == 0 and columns % 16 == 0, "the matrices' sizes must be multiples of 16"
    assert scale.shape == (rows, 1) and weight_scale.shape == (1, columns)
    assert scale.dtype == weight_scale.dtype == torch.float32 and scale.is_contiguous() and weight_scale.is_contiguous()
    assert out.dtype == dtype == torch.bfloat16 and out.shape == (rows, columns)
    assert out.stride(1) == 1 and out.stride(0) >= columns
    assert bias is None or (bias.dtype == torch.bfloat16 and bias.shape == (columns,))
    assert not any(matrix.data_ptr() % 16 for matrix in (x, weight, out)), "operands must be aligned to 16 bytes"
    for table in (scale, weight_scale):
        # Some kernels read past the last row (pytorch issue 133334).
        assert table.untyped_storage().nbytes() // 4 - table.storage_offset() >= -(-table.numel() // 256) * 256
    sums = x.float() @ weight.float() * scale * weight_scale
    return out.copy_(sums if bias is None else sums + bias)


SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "aten._addmm_activation.default": _addmm_activation,
    "aten._addmm_activation.out": _addmm_activation_out,
    "torch_attn._varlen_attn.default": _varlen_attn,
    "aten._scaled_mm_v2.out": _scaled_mm_v2,
}
"""By the name of the operation."""
