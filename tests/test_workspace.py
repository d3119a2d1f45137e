"""A workspace lends the same memory for the same name, and only for that."""

import pytest
import torch
from torch import Tensor

from uso_engine.model.workspace import Workspace

LIKE = torch.zeros(1, dtype=torch.bfloat16)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_a_name_is_one_memory_whatever_the_shape() -> None:
    workspace = Workspace()
    large = workspace.take("a", (8, 32), LIKE)
    assert (large.shape, large.dtype, large.is_contiguous()) == ((8, 32), torch.bfloat16, True)
    assert workspace.size_bytes == 8 * 32 * 2
    for shape, dtype in (((4, 32), None), ((32, 8), None), ((128,), torch.float32), ((512,), torch.float8_e4m3fn)):
        small = workspace.take("a", shape, LIKE, dtype)
        assert (small.shape, small.dtype) == (shape, dtype or torch.bfloat16)
        assert small.data_ptr() == large.data_ptr()
    assert workspace.take("a", (8, 32), LIKE) is large
    assert storage(workspace.take("b", (8, 32), LIKE)) != storage(large)
    assert workspace.size_bytes == 2 * 8 * 32 * 2


def test_memory_grows_and_forgets_what_was_smaller() -> None:
    workspace = Workspace()
    small = workspace.take("a", (4,), LIKE)
    other = workspace.take("b", (4,), LIKE)
    large = workspace.take("a", (400,), LIKE)
    assert workspace.size_bytes == 404 * 2
    again = workspace.take("a", (4,), LIKE)
    assert storage(again) == storage(large) != storage(small)
    assert workspace.take("b", (4,), LIKE) is other


def test_another_device_is_other_memory() -> None:
    workspace = Workspace()
    workspace.take("a", (4,), LIKE)
    assert workspace.take("a", (4,), LIKE.to("meta")).device.type == "meta"
    assert workspace.take("a", (4,), LIKE).device.type == "cpu"


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_without_reuse_every_tensor_is_new(dtype: torch.dtype | None) -> None:
    workspace = Workspace(reuse=False)
    first, second = (workspace.take("a", (2, 3), LIKE, dtype) for _ in range(2))
    assert storage(first) != storage(second)
    assert (first.shape, first.dtype) == ((2, 3), dtype or torch.bfloat16)
    assert workspace.size_bytes == 0
