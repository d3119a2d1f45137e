"""FlashAttention-3 and -4 as backends, with a stand-in for the packages: what they are given, what becomes of it, why not."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from kernel_runs import drawn, unwritten_is_nan
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.attention import available_backends
from uso_kernels.attention.flash import FLASH_ATTENTION_3, FLASH_ATTENTION_4, FlashAttention, _failure
from uso_kernels.attention.triton import attention_reference
from uso_kernels.ragged import Ragged

BOTH = (FLASH_ATTENTION_3, FLASH_ATTENTION_4)
CUDA = torch.device("cuda")
CPU = ("cpu", torch.float32)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `flash_attn_func` says of itself: [B, L, H, D] in and out, scaled by 1 / sqrt(D), not causal."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def install(monkeypatch: pytest.MonkeyPatch, backend: FlashAttention, returns_sums: bool) -> None:
    """Put a stand-in where the backend looks; old versions also give the logarithms of the sums, [B, H, L]."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        result = by_pytorch(q, k, v)
        return (result, torch.full((1, q.shape[2], q.shape[1]), float("nan"))) if returns_sums else result

    module = ModuleType(backend.module)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    parent = backend.module.partition(".")[0]
    if parent != backend.module:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, backend.module, module)


@pytest.mark.parametrize("backend", BOTH, ids=lambda backend: backend.title)
@pytest.mark.parametrize("returns_sums", [False, True])
def test_every_sequence_attends_to_itself(monkeypatch: pytest.MonkeyPatch, backend: FlashAttention, returns_sums: bool) -> None:
    """Fewer queries than keys, parts of wider tensors, and a neighbour and padding that are NaN."""
    install(monkeypatch, backend, returns_sums)
    queries, keys = Ragged.pack([33, 5]), Ragged.pack([150, 40])
    wide = drawn(keys.rows, 3, 2, 64, seed=5, place=CPU)
    wide[keys.span(1)] = wide[keys.span(0).stop : keys.end(0)] = float("nan")
    q, k, v = wide[: queries.rows, 0], wide[:, 1], wide[:, 2]
    expected = attention_reference(q, k, v, queries, keys)
    with unwritten_is_nan():
        result = backend.attend(q, k, v, queries, keys)
    assert torch.equal(result[: queries.starts[1]], expected[: queries.starts[1]])
    assert not result[33 : queries.starts[1]].any()
    assert result[queries.span(1)].isnan().all()


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether an extension is there is found out for this test, and not kept after it, even where it fails."""
    _failure.cache_clear()
    yield
    _failure.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_gpu_that_has_no_such_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, third, fourth in (
        ((8, 0), "needs compute capability 9.x, got 8.0", "needs compute capability 9.x or 10.x, got 8.0"),
        ((9, 0), "flash_attn_interface is not installed", "flash_attn is not installed"),
        ((10, 0), "needs compute capability 9.x, got 10.0", "flash_attn is not installed"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        for backend, reason in zip(BOTH, (third, fourth), strict=True):
            assert reason in str(backend.missing(CUDA))


@pytest.mark.usefixtures("asked_anew")
def test_on_a_gpu_that_has_one_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for backend in BOTH:
        install(monkeypatch, backend, returns_sums=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert [backend.missing(CUDA) for backend in BOTH] == [None, None]


def test_without_cuda_both_say_so() -> None:
    reasons = available_backends("cpu")
    assert reasons["flash3"] == "FlashAttention-3 runs on CUDA only"
    assert reasons["flash4"] == "FlashAttention-4 runs on CUDA only"
