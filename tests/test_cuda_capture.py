"""Capturing on a simulated GPU, by PyTorch's own context managers: which stream, and what a failing capture leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from uso_engine.sampling import cuda_capture
from uso_engine.sampling.cuda_capture import CudaCapturing

POOL = (0, 7)


@dataclass
class SimulatedGPUs:
    """Two GPUs with a current one, a current stream, and the captures that the allocator knows of."""

    device: int = 0
    streams: list[FakeStream] = field(default_factory=list)
    recording: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    released: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    captured_on: list[int] = field(default_factory=list)
    is_invalidated: bool = False

    @property
    def stream(self) -> FakeStream:
        return self.streams[self.device]


class FakeStream:
    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def end_recording(gpus: SimulatedGPUs, device: int, pool: tuple[int, int]) -> None:
    """As PyTorch's allocator."""
    if (device, pool) not in gpus.recording:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    gpus.recording.remove((device, pool))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPUs]:
    made = SimulatedGPUs()
    made.streams = [FakeStream(0), FakeStream(1)]

    class Graph:
        def capture_begin(self, *pool: tuple[int, int], **options: object) -> None:
            assert options["capture_error_mode"] == "thread_local"
            made.captured_on.append(made.stream.device.index)
            made.recording.append((made.device, *pool))  # type: ignore[arg-type]

        def capture_end(self) -> None:
            if made.is_invalidated:
                # Where it happens, PyTorch has told its allocator nothing yet.
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            end_recording(made, made.device, POOL)

    def set_stream(stream: FakeStream) -> None:
        made.device = stream.device.index
        made.streams[made.device] = stream

    answers: dict[str, object] = {
        "is_available": lambda: True,
        "current_device": lambda: made.device,
        "current_stream": lambda device=None: made.stream,
        "set_stream": set_stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "Stream": lambda device=None: FakeStream(made.device if device is None else device),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: POOL,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: end_recording(made, *given), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *given: made.released.append(given), raising=False)
    cuda_capture._stream.cache_clear()
    yield made
    cuda_capture._stream.cache_clear()


def test_each_gpu_captures_on_a_stream_of_its_own(gpus: SimulatedGPUs) -> None:
    """PyTorch keeps one stream for all captures of a process, and work on another GPU would then not be captured at all."""
    before = list(gpus.streams)
    for device in (0, 1, 0):
        gpus.device = device
        _, result = CudaCapturing().capture(lambda: torch.tensor(gpus.device))
        assert (int(result), gpus.device, gpus.streams) == (device, device, before)
    assert gpus.captured_on == [0, 1, 0]
    assert (gpus.recording, gpus.released) == ([], [])


def fail() -> Tensor:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("compute", "is_invalidated", "released"),
    [(fail, True, True), (lambda: torch.zeros(1), True, True), (fail, False, False)],
    ids=["a forbidden call", "an end that fails", "an error of Python's"],
)
def test_a_capture_that_fails_leaves_the_stream_and_the_allocator_as_they_were(
    compute: Callable[[], Tensor], is_invalidated: bool, released: bool, gpus: SimulatedGPUs
) -> None:
    """PyTorch goes on with the stream of a capture that it could not end, and its allocator takes it to be under way for good:
    later steps would be computed in no order with other threads' work, and memory never given back."""
    gpus.device, before, gpus.is_invalidated = 1, gpus.streams[1], is_invalidated
    with pytest.raises(RuntimeError, match="CUDA error"):
        CudaCapturing().capture(compute)
    assert gpus.device == 1 and gpus.stream is before
    assert gpus.recording == []
    assert gpus.released == ([(1, POOL)] if released else [])
    gpus.is_invalidated = False
    CudaCapturing().capture(lambda: torch.zeros(1))
    assert gpus.stream is before and gpus.recording == []
