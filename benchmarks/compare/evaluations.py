"""Times, counts and keeps what a way's transformer computes while its requests run."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.measure import Clock, profiled_allocations


def _cpu_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *others: object, **more: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _gelu_product_flops(bias: torch.Size, x: torch.Size, transposed: torch.Size, *others: object, **more: object) -> int:
    return 2 * x[0] * x[1] * transposed[1]


def _cpu_gelu_product_flops(x: torch.Size, weight: torch.Size, *others: object, **more: object) -> int:
    return 2 * x[0] * x[1] * weight[0]


# The counter knows neither the dense attention of a CPU nor products that end in GELU.
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._addmm_activation: _gelu_product_flops,
    torch.ops.mkldnn._linear_pointwise: _cpu_gelu_product_flops,
}


@dataclass
class Counts:
    """What one evaluation took.

    Args:
        flops: of matrix products and attention, those that the way computes, needed or not.
        allocations: how many.
        allocated_mib: all of them together.
        velocity: what came out.
    """

    flops: int
    allocations: int
    allocated_mib: float
    velocity: Tensor


@dataclass
class Evaluations:
    """A way's evaluations: `begin` and `end` stand around each.

    Args:
        device: a GPU's are timed by events.
        clock: of a CPU.
        counts_flops: whether the counter may stand around the first; not around compiled code.
    """

    device: torch.device
    clock: Clock
    counts_flops: bool = True
    counts: Counts | None = None
    _times: list[float] = field(default_factory=list)
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _started_s: float = 0.0
    _inspecting: ExitStack | None = None
    _counter: FlopCounterMode | None = None
    _profiler: torch.profiler.profile | None = None
    _before: tuple[int, int] = (0, 0)
    _inspect_next: bool = False

    def inspect(self) -> None:
        """Count what the next evaluation takes, instead of timing it."""
        self._inspect_next = True

    def reset(self) -> None:
        """Forget the times."""
        self._times, self._events = [], []

    def watch(self, module: nn.Module) -> None:
        """Stand around a module's evaluations."""
        module.register_forward_pre_hook(lambda *_: self.begin())
        module.register_forward_hook(lambda module, arguments, output: self.end(output))

    def begin(self) -> None:
        """An evaluation begins."""
        if self._inspect_next:
            self._inspect_next = False
            self._begin_inspection()
        elif self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._events.append((begin, end))
        else:
            self._started_s = self._now()

    def end(self, output: Tensor | tuple[Tensor, ...]) -> None:
        """It has ended."""
        if self._inspecting is not None:
            self._end_inspection(output if isinstance(output, Tensor) else output[0])
        elif self.device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._times.append(1e3 * (self._now() - self._started_s))

    def milliseconds(self) -> list[float]:
        """Of every evaluation since `reset`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [begin.elapsed_time(end) for begin, end in self._events]
        return list(self._times)

    def _now(self) -> float:
        return time.process_time() if self.clock == "process" else time.perf_counter()

    def _begin_inspection(self) -> None:
        self._inspecting = ExitStack()
        if self.device.type == "cuda":
            self._before = self._allocated()
        else:
            cpu = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = self._inspecting.enter_context(torch.profiler.profile(activities=cpu, profile_memory=True))
        if self.counts_flops:
            self._counter = self._inspecting.enter_context(FlopCounterMode(display=False, custom_mapping=UNCOUNTED))

    def _end_inspection(self, velocity: Tensor) -> None:
        assert self._inspecting is not None
        self._inspecting.close()
        self._inspecting = None
        flops = 0 if self._counter is None else int(self._counter.get_total_flops())
        if self._profiler is None:
            count, size = (after - before for after, before in zip(self._allocated(), self._before, strict=True))
        else:
            found = profiled_allocations(self._profiler)
            count, size = found.number, found.size_bytes
        self.counts = Counts(flops, count, size / 2**20, velocity.detach().clone())
        self._profiler = self._counter = None

    def _allocated(self) -> tuple[int, int]:
        statistics = torch.cuda.memory_stats(self.device)
        return int(statistics["allocation.all.allocated"]), int(statistics["allocated_bytes.all.allocated"])
