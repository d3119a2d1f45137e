"""A GPU divides a tensor by a number as a product with the number's reciprocal; what is compared bit for bit must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from uso_kernels.rows import quantize_rows_reference

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
DIVISIONS = (torch.ops.aten.div.Tensor, torch.ops.aten.div.out, torch.ops.aten.div_.Tensor, torch.ops.aten.div.Scalar)


class DividesLikeCuda(TorchDispatchMode):
    """Float divisions by a number as CUDA makes them: times its reciprocal, rounded to the type of the computation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replaced = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func in DIVISIONS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            divisor = args[1]
            if isinstance(divisor, (int, float)) or (divisor.ndim == 0 and args[0].ndim > 0):
                self.replaced += 1
                reciprocal = torch.ones((), dtype=torch.float32) / torch.as_tensor(divisor, dtype=torch.float32)
                result.copy_(args[0] * reciprocal)
        return result


def test_the_emulation_rounds_as_a_gpu_does() -> None:
    """About half of all quotients come out a bit off; if the emulation moved none, the tests below would show nothing."""
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 10
    out = torch.empty_like(amax)
    with DividesLikeCuda() as mode:
        by_number = amax / 448.0
        torch.div(amax, 448.0, out=out)
        by_tensor = amax / torch.full_like(amax, 448.0)
    assert mode.replaced == 2
    assert torch.equal(by_number, out)
    assert torch.equal(by_tensor, amax / 448.0)
    assert 0.4 < float((by_number != by_tensor).float().mean()) < 0.7


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_the_reference_gives_the_same_row_scales_on_a_gpu(dtype: torch.dtype) -> None:
    """The other references that end in 8-bit rows call this one."""
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(1)) * 3
    values, scales = quantize_rows_reference(x, dtype)
    with DividesLikeCuda():
        gpu_values, gpu_scales = quantize_rows_reference(x, dtype)
    assert torch.equal(scales, gpu_scales)
    assert torch.equal(values.view(torch.int8), gpu_values.view(torch.int8))
