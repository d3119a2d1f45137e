"""PyTorch's interface to CUDA over simulated GPUs, for as long as a test runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from simulated_device import CPU, SimulatedGPUs, SimulatedStream, device_of, is_pinned
from simulated_gpu import GPUMode
from simulated_graph import SimulatedGraph
from simulated_launches import simulated_launch
from torch import Tensor
from torch.utils._device import _device_constructors

from uso_engine.sampling import cuda_capture
from uso_kernels import launch, operation
from uso_kernels.attention import dense

BASE = torch._C.TensorBase


class _Stream(SimulatedStream):
    gpus: SimulatedGPUs

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        super().__init__(self.gpus, self.gpus.place("cuda" if device is None else device))


class _Graph(SimulatedGraph):
    gpus: SimulatedGPUs

    def __init__(self) -> None:
        super().__init__(self.gpus)


class _Generator(torch.Generator):
    """Draws on the CPU whatever the device."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Event:
    gpus: SimulatedGPUs

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.stream: SimulatedStream | None = None
        self._time_s = 0.0

    def record(self, stream: SimulatedStream | None = None) -> None:
        self.stream, self._time_s = stream or self.gpus.stream(), time.perf_counter()

    def synchronize(self) -> None:
        if self.stream is not None:
            self.gpus.wait("event.synchronize", self.stream)

    def wait(self, stream: SimulatedStream | None = None) -> None:
        (stream or self.gpus.stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end._time_s - self._time_s)


def _api(gpus: SimulatedGPUs) -> dict[str, Any]:
    """Functions and classes of `torch.cuda`."""

    def index(device: Any = None) -> int:
        return gpus.current if device is None else int(gpus.place(device).index)

    def set_device(device: Any) -> None:
        if not isinstance(device, int) and torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        gpus.current = index(device)

    def exchange(device: int) -> int:
        before = gpus.current
        if device >= 0:
            gpus.current = device
        return before

    return {
        "_lazy_init": lambda: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: gpus.count,
        "current_device": lambda: gpus.current,
        "set_device": set_device,
        "get_device_capability": lambda device=None: gpus.capability,
        "get_device_name": lambda device=None: "simulated",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": lambda device=None: gpus.wait("synchronize"),
        "current_stream": lambda device=None: gpus.stream(index(device)),
        "default_stream": lambda device=None: gpus.default_streams[index(device)],
        "set_stream": gpus.set_stream,
        "is_current_stream_capturing": lambda: gpus.stream().capture is not None,
        "Stream": type("Stream", (_Stream,), {"gpus": gpus}),
        "Event": type("Event", (_Event,), {"gpus": gpus}),
        "CUDAGraph": type("CUDAGraph", (_Graph,), {"gpus": gpus}),
        "graph_pool_handle": lambda: (0, len(gpus.graphs) + 1),
    }


def _memory_api(gpus: SimulatedGPUs) -> dict[str, Any]:
    """What `torch.cuda` says of devices and their memory."""

    def snapshot() -> list[dict[str, Any]]:
        graphs = [graph for reference in gpus.graphs if (graph := reference()) is not None]
        return [{"total_size": graph.size_bytes, "segment_pool_id": graph.pool_id} for graph in graphs]

    major, minor = gpus.capability
    properties = SimpleNamespace(name="simulated", total_memory=gpus.total_bytes, major=major, minor=minor)

    def held(device: Any = None) -> int:
        return gpus.held_bytes(gpus.current if device is None else int(gpus.place(device).index))

    return {
        "mem_get_info": lambda device=None: (gpus.total_bytes - held(device), gpus.total_bytes),
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), held),
        "get_device_properties": lambda device=None: properties,
        "memory_snapshot": snapshot,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
    }


def _tensor_api(gpus: SimulatedGPUs) -> dict[str, Any]:
    """Attributes of `torch.Tensor` that ask or change a tensor's device."""

    def to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        asked = kwargs.pop("device", None)
        if args and (isinstance(args[0], (str, torch.device)) or args[0] is None):
            asked, args = args[0], args[1:]
        here = device_of(tensor)
        target = here if asked is None else gpus.place(asked)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(target, *args, **kwargs)
        if target == here:
            dtype = tensor.dtype if dtype is None else dtype
            same: Tensor = BASE.to(tensor, dtype=dtype, copy=copy, memory_format=layout)
            return same
        with gpus.moving(target):
            moved: Tensor = torch.ops.aten._to_copy(
                tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=layout
            )
        return moved

    def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if device_of(tensor) != CPU:
            raise TypeError(f"can't convert {device_of(tensor)} device type tensor to numpy")
        return BASE.numpy(tensor, *args, **kwargs)

    def tolist(tensor: Tensor) -> Any:
        if device_of(tensor) != CPU:
            gpus.wait("tolist", gpus.stream(device_of(tensor).index))
        return BASE.tolist(tensor)

    def pin_memory(tensor: Tensor, device: object = None) -> Tensor:
        return tensor if is_pinned(tensor) else torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    return {
        "device": property(device_of),
        "is_cuda": property(lambda tensor: device_of(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: device_of(tensor).type == "cpu"),
        "get_device": lambda tensor: -1 if device_of(tensor) == CPU else device_of(tensor).index,
        "to": to,
        "cpu": lambda tensor: to(tensor, "cpu"),
        "cuda": lambda tensor, device=None, non_blocking=False: to(
            tensor, "cuda" if device is None else device, non_blocking=non_blocking
        ),
        "numpy": numpy,
        "__array__": lambda tensor, dtype=None, copy=None: np.asarray(numpy(tensor.detach()), dtype=dtype),
        "tolist": tolist,
        "pin_memory": pin_memory,
        "is_pinned": lambda tensor, device=None: is_pinned(tensor),
        "record_stream": lambda tensor, stream: None,
    }


def _made_on_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor of Python's numbers: PyTorch makes it on the host, whatever the device."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        tensor = make(data, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


@contextmanager
def simulated_gpus(count: int = 2, capability: tuple[int, int] = (9, 0)) -> Iterator[SimulatedGPUs]:
    """Within it PyTorch has simulated GPUs, in this thread and in all that it starts."""
    # What `with torch.device(…)` changes PyTorch keeps at its first use: it is to be its own, not what is put in its place.
    _device_constructors()
    gpus = SimulatedGPUs(count, capability)
    run = threading.Thread.run

    def run_with_gpus(thread: threading.Thread) -> None:
        with GPUMode(gpus):
            run(thread)

    def caches() -> None:
        for cached in (launch._generation, cuda_capture._stream, dense._capability):
            cached.cache_clear()
        for known in operation.OPERATIONS.values():
            known.prepared.clear()

    changes: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in (_api(gpus) | _memory_api(gpus)).items()),
        *((Tensor, name, value) for name, value in _tensor_api(gpus).items()),
        *((torch, name, _made_on_the_host(getattr(torch, name))) for name in ("tensor", "as_tensor")),
        (torch, "Generator", _Generator),
        (torch.cuda.graph, "default_capture_stream", None),
        (torch._C, "_host_emptyCache", lambda: None),
        (torch.accelerator, "empty_host_cache", lambda: None),
        (torch._C, "_cuda_endAllocateToPool", lambda device, pool: None),
        (torch._C, "_cuda_releasePool", lambda device, pool: None),
        (threading.Thread, "run", run_with_gpus),
        (launch, "TRITON_MISSING", None),
        (launch, "_driver_failure", lambda: None),
        # PyTorch's own operators are watched, the kernels' launches must be as without that.
        (operation, "is_in_torch_dispatch_mode", lambda: False),
        (operation.Operation, "launch", simulated_launch(gpus, operation.Operation.launch)),
    ]
    caches()
    try:
        with _patched(changes), GPUMode(gpus):
            yield gpus
    finally:
        caches()


@contextmanager
def _patched(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    patches = [patch.object(owner, name, value, create=True) for owner, name, value in changes]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()
