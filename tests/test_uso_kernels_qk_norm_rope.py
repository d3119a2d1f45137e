"""Splitting, normalising, turning and placing queries, keys and values: the kernel against a float64 truth."""

import pytest
import torch
from kernel_runs import PLACES, check_error, drawn, poisoned, run_kernel
from torch import Tensor

from uso_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_into

Place = tuple[str, torch.dtype]


def operands(head_dim: int, heads: int, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A strided projection of 32 rows, both norm weights, and rotary tables of 48 joint rows."""
    width = 3 * heads * head_dim
    qkv = drawn(32, width + 16, seed=0, place=place)[:, :width]
    q_scale, k_scale = drawn(2, head_dim, seed=1, place=place, mean=1.0)
    angles = drawn(48, head_dim // 2, seed=2, place=(place[0], torch.float64)) * 100
    return qkv, q_scale, k_scale, angles.cos().float(), angles.sin().float()


def turned_in(dtype: torch.dtype, x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm and rotation of [R, H, D] by [R, D / 2], written apart from the module: a shared mistake would not show."""
    wide = x.to(dtype)
    normed = wide / (wide.pow(2).sum(-1, keepdim=True) / wide.shape[-1] + eps).sqrt() * scale.to(dtype)
    c, s = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    turned = torch.empty_like(normed)
    turned[..., 0::2] = normed[..., 0::2] * c - normed[..., 1::2] * s
    turned[..., 1::2] = normed[..., 0::2] * s + normed[..., 1::2] * c
    return turned


@pytest.mark.parametrize("heads", [1, 3, 24])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("place", PLACES)
def test_rows_land_normalised_and_turned_where_they_belong(place: Place, head_dim: int, heads: int) -> None:
    qkv, q_scale, k_scale, cos, sin = operands(head_dim, heads, place)
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:32].to(place[0])
    targets = [poisoned(48, heads, head_dim, dtype=place[1], device=place[0]) for _ in range(3)]
    run_kernel(qk_norm_rope_into, qkv, q_scale, k_scale, cos, sin, rows, *targets, 1e-6)
    q, k, v = qkv.unflatten(1, (3, heads, head_dim)).unbind(1)
    reference = [torch.empty_like(target) for target in targets]
    qk_norm_rope_into.reference(qkv, q_scale, k_scale, cos, sin, rows, *reference, 1e-6)
    others = torch.ones(48, dtype=torch.bool, device=place[0])
    others[rows] = False
    for place_of, x, scale in ((0, q, q_scale), (1, k, k_scale)):
        given = x, scale, cos[rows], sin[rows], 1e-6
        for result in (targets[place_of], reference[place_of]):
            check_error(result[rows], turned_in(torch.float32, *given).to(x.dtype), turned_in(torch.float64, *given))
    for target in targets:
        assert target[others].isnan().all()
    assert torch.equal(targets[2][rows], v)


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_in_joint_order_needs_no_index(place: Place) -> None:
    qkv, q_scale, k_scale, cos, sin = operands(128, 2, place)
    given = (qkv, q_scale, k_scale, cos[:32], sin[:32])
    first, second = ([poisoned(32, 2, 128, dtype=place[1], device=place[0]) for _ in range(3)] for _ in range(2))
    run_kernel(qk_norm_rope_into, *given, None, *first, 1e-6)
    run_kernel(qk_norm_rope_into, *given, torch.arange(32, device=place[0]), *second, 1e-6)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_operation_keeps_torchs_rules_and_gradients_flow() -> None:
    qkv, q_scale, k_scale, cos, sin = operands(64, 2, ("cpu", torch.float32))
    rows = torch.arange(32)
    q, k, v = (torch.zeros(48, 2, 64) for _ in range(3))
    torch.library.opcheck(qk_norm_rope_into.op, (qkv, q_scale, k_scale, cos, sin, rows, q, k, v, 1e-6))
    leaf = qkv.clone().requires_grad_()
    q, k, v = (torch.zeros(48, 2, 64) for _ in range(3))
    qk_norm_rope(leaf, q_scale, k_scale, cos, sin, rows, q, k, v)
    (q.square().sum() * 0 + (q * k).sum() + v.sum()).backward()
    assert leaf.grad is not None
    assert all(part.abs().sum() > 0 for part in leaf.grad.chunk(3, dim=1))


def test_bad_operands_are_refused() -> None:
    qkv, q_scale, k_scale, cos, sin = operands(64, 2, ("cpu", torch.float32))
    rows, target = torch.arange(32), torch.empty(48, 2, 64)
    good = (qkv, q_scale, k_scale, cos, sin, rows, target, target.clone(), target.clone())

    def refused(position: int, value: object, message: str) -> None:
        changed = [*good[:position], value, *good[position + 1 :]]
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(*changed)  # type: ignore[arg-type]

    refused(0, qkv[:, :300], r"qkv must be")
    refused(1, q_scale[:32], "q_scale must be")
    refused(3, cos[:40], "cos must be float32")
    refused(3, cos.half(), "cos must be float32")
    refused(5, rows.int(), "int64")
    refused(5, None, "expected 48 rows")
    refused(6, target[:40], "one shape")
    refused(7, target.half(), "k must be")
    small = operands(32, 2, ("cpu", torch.float32))
    with pytest.raises(ValueError, match=r"\(64, 128\) have kernels, got 32"):
        run_kernel(qk_norm_rope_into, *small, rows, *(torch.empty(48, 2, 32) for _ in range(3)), 1e-6)
