"""What a simulated GPU refuses and what it notes, as a real one would: each rule by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from simulated_cuda import simulated_gpus
from simulated_device import DeviceFault, SimulatedGPUs
from torch import Tensor

from uso_engine.sampling.cuda_capture import CudaCapturing
from uso_kernels.euler_update import euler_update_into
from uso_kernels.operation import CallSite

FIRST, SECOND = "cuda:0", "cuda:1"


@pytest.fixture
def gpus() -> Iterator[SimulatedGPUs]:
    with simulated_gpus() as found, torch.no_grad():
        yield found


def test_a_tensor_says_where_it_is(gpus: SimulatedGPUs) -> None:
    made = torch.ones(4, device=SECOND)
    parts = made[1:].view(3, 1), made * 2, torch.zeros_like(made), made.new_empty(3), made.to(torch.bfloat16)
    assert {str(part.device) for part in parts} == {SECOND}
    assert torch.nn.Linear(2, 2).to(SECOND).weight.is_cuda and made.cpu().device.type == "cpu"
    torch.cuda.set_device(1)
    assert torch.tensor([1.0], device="cuda").device == made.device
    assert made.data_ptr() == made.view(2, 2).data_ptr() and made.new_empty(3).isnan().all()


@pytest.mark.parametrize(
    "compute",
    [
        lambda here, there, host: here + there,
        lambda here, there, host: here + host,
        lambda here, there, host: torch.cat([here, host]),
        lambda here, there, host: here.index_select(0, host.long()),
        lambda here, there, host: host.add_(here[0]),
        lambda here, there, host: here.numpy(),
    ],
    ids=["two GPUs", "a GPU and the host", "joined", "an index", "a number of a GPU", "numpy"],
)
def test_operands_of_two_devices_are_refused(compute: Callable[..., object], gpus: SimulatedGPUs) -> None:
    here, there, host = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND), torch.ones(2)
    assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0]  # A number of the host may stand beside a GPU's.
    with pytest.raises((DeviceFault, TypeError), match=r"same device|numpy"):
        compute(here, there, host)


@pytest.mark.parametrize(
    ("compute", "waits"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x.item(), 1),
        (lambda x: bool(x > 0), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.ones(2).to(x.device), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.repeat_interleave(torch.ones(1, dtype=torch.int64, device=x.device)), 1),
        (lambda x: torch.empty(1, pin_memory=True).copy_(x, non_blocking=True), 0),
        (lambda x: torch.empty(1).copy_(x, non_blocking=True), 1),
    ],
)
def test_what_waits_is_counted(compute: Callable[[Tensor], object], waits: int, gpus: SimulatedGPUs) -> None:
    x = torch.ones(1, device=FIRST)
    gpus.waits.clear()
    compute(x)
    assert len(gpus.waits) == waits


def test_copies_that_do_not_block(gpus: SimulatedGPUs) -> None:
    """Host memory is left alone until somebody has waited for the copy."""
    with pytest.raises(DeviceFault, match="not pinned"):
        torch.ones(2).to(FIRST, non_blocking=True)
    kept = torch.empty(2, pin_memory=True)
    kept.copy_(torch.ones(2, device=FIRST), non_blocking=True)
    with pytest.raises(DeviceFault, match="under way"):
        kept.sum()
    torch.empty(2, device=FIRST).copy_(kept, non_blocking=True)  # In the order of the same stream.
    torch.cuda.current_stream(FIRST).synchronize()
    assert kept.sum() == 2
    there = kept.to(FIRST, non_blocking=True)
    with pytest.raises(DeviceFault, match="under way"):
        kept.zero_()
    there.sum().item()
    kept.zero_()


def test_a_graph_computes_what_lies_where_it_was(gpus: SimulatedGPUs) -> None:
    inputs, total = [torch.ones(2, device=FIRST)], torch.zeros(2, device=FIRST)
    captured, doubled = CudaCapturing().capture(lambda: total.add_(inputs[0]) * 2)
    # Nothing is computed until it is replayed, and then each time anew.
    assert total.tolist() == [0.0, 0.0] and doubled.isnan().all()
    captured.replay()
    inputs[0].fill_(5.0)
    captured.replay()
    assert (total.tolist(), doubled.tolist()) == ([6.0, 6.0], [12.0, 12.0])
    assert captured.size_bytes >= doubled.nbytes
    inputs.clear()
    with pytest.raises(DeviceFault, match="given back since"):
        captured.replay()


@pytest.mark.parametrize("ask", [Tensor.item, lambda x: torch.ones(1).to(x.device), lambda x: torch.cuda.synchronize()])
def test_nothing_waits_while_a_graph_is_captured(ask: Callable[[Tensor], object], gpus: SimulatedGPUs) -> None:
    x = torch.ones((), device=FIRST)
    with pytest.raises(DeviceFault, match="not permitted when stream is capturing"):
        CudaCapturing().capture(lambda: (ask(x), x)[1])


def operands(device: str, rows: int = 16) -> tuple[Tensor, Tensor, Tensor, None, None, Tensor]:
    latents, velocity, delta = torch.ones(rows, 64), torch.full((rows, 64), 2.0), torch.full((rows,), 0.5)
    return latents.to(device), velocity.to(device), delta.to(device), None, None, torch.empty(rows, 64, device=device)


def test_launches_go_to_the_current_gpu_and_get_addresses_alone(gpus: SimulatedGPUs) -> None:
    site, given = CallSite(euler_update_into), operands(FIRST)
    for expected in (2.0, 3.0):  # Described and prepared, then by addresses.
        site(*given)
        assert given[0].unique().tolist() == [expected]
    torch.cuda.set_device(1)
    with pytest.raises(DeviceFault, match="memory of GPU 0 in a launch on GPU 1"):
        site(*given)
    torch.cuda.set_device(0)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        site(*operands(FIRST, 8))  # Whoever keeps a site promises operands of one layout.
    with pytest.raises(DeviceFault, match="illegal memory access"):
        site(*operands("cpu"))
