"""What a simulated GPU is: memory that has a device, streams, a current one of each in every thread, and who waits for them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
REAL_DEVICE = torch._C.TensorBase.device
OURS = ("uso_engine", "uso_kernels", "transformers", "diffusers", "tests")


class DeviceFault(RuntimeError):
    """What a GPU would refuse, or what would give wrong numbers on one."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the device.

    Args:
        operation: what makes it wait.
        frames: the functions that it came from, the innermost first: `denoiser.step`.
    """

    operation: str
    frames: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation} in {' < '.join(self.frames[:6])}"


class SimulatedStream:
    """A queue of a device: work on it is done at once, and nobody may rely on that.

    Args:
        gpus: whose.
        device: of which.
    """

    def __init__(self, gpus: SimulatedGPUs, device: torch.device) -> None:
        self._gpus, self.device = gpus, device
        self.cuda_stream = self.stream_id = len(gpus.streams)
        self.device_index = device.index
        gpus.streams.append(self)
        self.copies: list[Any] = []
        """Host memory that copies queued here read or write."""
        self.capture: Any = None

    def synchronize(self) -> None:
        self._gpus.wait("stream.synchronize", self)

    def wait_event(self, event: Any) -> None:
        if event.stream is not None:
            self.wait_stream(event.stream)

    def wait_stream(self, stream: SimulatedStream) -> None:
        """Go on behind another: one that waits for a stream that is captured is captured with it."""
        if self.capture is None and stream.capture is not None:
            self.capture = stream.capture
            self.capture.forked.append(self)
        elif self.capture is not None and stream in self.capture.forked:
            self.capture.joined.append(stream)

    def record_event(self, event: Any = None) -> Any:
        event = torch.cuda.Event() if event is None else event
        event.record(self)
        return event

    def finish(self) -> None:
        """All that was queued is done."""
        for storage in self.copies:
            storage.incoming.discard(self)
            storage.outgoing.discard(self)
        self.copies.clear()


@dataclass
class SimulatedGPUs:
    """GPUs with a current one, and a current stream of each, in every thread."""

    count: int = 2
    capability: tuple[int, int] = (9, 0)
    total_bytes: int = 80 * 2**30
    waits: list[Wait] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    streams: list[SimulatedStream] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)
    """Weak references to every graph."""

    def __post_init__(self) -> None:
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._memory: dict[int, tuple[int, int, Any]] = {}
        self.default_streams = [SimulatedStream(self, torch.device("cuda", index)) for index in range(self.count)]

    @property
    def current(self) -> int:
        """Number of the device that is current in this thread."""
        return getattr(self._thread, "device", 0)

    @current.setter
    def current(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise DeviceFault(f"CUDA error: invalid device ordinal {index}")
        self._thread.device = index

    def stream(self, index: int | None = None) -> SimulatedStream:
        """The stream that is current on a device in this thread."""
        index = self.current if index is None else index
        found: SimulatedStream = self._streams().get(index, self.default_streams[index])
        return found

    def set_stream(self, stream: SimulatedStream) -> None:
        """Make a stream, and its device, current."""
        self.current = stream.device.index
        self._streams()[stream.device.index] = stream

    def _streams(self) -> dict[int, SimulatedStream]:
        if not hasattr(self._thread, "streams"):
            self._thread.streams = {}
        found: dict[int, SimulatedStream] = self._thread.streams
        return found

    def place(self, device: str | int | torch.device) -> torch.device:
        """A device with its number."""
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", self.current) if found.type == "cuda" and found.index is None else found

    @contextmanager
    def moving(self, target: torch.device) -> Iterator[None]:
        """Within it a copy goes to a device: to PyTorch both are the CPU, which it says of copies that stay where they are."""
        self._thread.target = target
        try:
            yield
        finally:
            self._thread.target = None

    def target_of(self, source: Tensor) -> torch.device:
        """Where a copy of a tensor goes."""
        target: torch.device | None = getattr(self._thread, "target", None)
        return device_of(source) if target is None else target

    def wait(self, operation: str, *streams: SimulatedStream) -> None:
        """The host waits for streams, or for the whole device."""
        for stream in streams or self.streams:
            if stream.capture is not None and stream is self.stream():
                raise DeviceFault(f"CUDA error: operation not permitted when stream is capturing ({operation})")
        self.waits.append(Wait(operation, frames()))
        for stream in streams or self.streams:
            stream.finish()

    def own(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Let a new tensor's memory be a device's."""
        if device.type == "cuda":
            storage = tensor.untyped_storage()
            storage.gpu = device  # type: ignore[attr-defined]
            address, size = storage.data_ptr(), storage.nbytes()
            if size:
                with self._lock:
                    self._memory[address] = (size, device.index, weakref.ref(storage))
                weakref.finalize(storage, self._free, address)
            if (capture := self.stream(device.index).capture) is not None:
                capture.pool.append(storage)
        return tensor

    def _free(self, address: int) -> None:
        with self._lock:
            found = self._memory.get(address)
            if found is not None and found[2]() is None:
                del self._memory[address]

    def held_bytes(self, index: int) -> int:
        """Memory of a device that is in use."""
        with self._lock:
            return sum(size for size, device, _ in self._memory.values() if device == index)

    def memory_at(self, address: int, size: int) -> Any:
        """The storage that an address of the current device lies in.

        Raises:
            DeviceFault: none, another device's, or one that ends before.
        """
        with self._lock:
            start = max((start for start in self._memory if start <= address), default=0)
            length, device, storage = self._memory.get(start, (0, 0, lambda: None))
        if address + size > start + length or storage() is None:
            raise DeviceFault(f"an illegal memory access: {size} bytes at {address:#x} are no device's")
        if device != self.current:
            raise DeviceFault(f"memory of GPU {device} in a launch on GPU {self.current}")
        return storage()


def frames() -> tuple[str, ...]:
    """The functions of the project and of the model libraries that called, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if (name := _name_of(frame.f_code)) is not None:
            found.append(name)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


@cache
def _name_of(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    is_ours = any(part in OURS for part in path.parts) and not path.stem.startswith("simulated")
    return f"{path.stem}.{code.co_name}" if is_ours else None


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies."""
    real: torch.device = REAL_DEVICE.__get__(tensor)
    if real != CPU:
        return real
    found: torch.device = getattr(tensor.untyped_storage(), "gpu", CPU)
    return found


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in host memory from which a GPU copies by itself."""
    return getattr(tensor.untyped_storage(), "pinned", False)
