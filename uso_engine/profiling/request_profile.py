"""One request under PyTorch's profiler: a trace, and the time of its steps by class of kernel beside what each class needs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from uso_engine.imaging.atomic import write_atomically
from uso_engine.model.roofline import Rates
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.step import OnStep

from .ceilings import known_rates
from .kernel_classes import ClassTime, KernelTime, floors_by_class, times_by_class
from .step_work import StepWork, counted_steps

if TYPE_CHECKING:
    from uso_engine.api.request import GenerationRequest
    from uso_engine.api.result import GenerationResult
    from uso_engine.engine import USOEngine

STEP = "uso-engine step"
"""What a step's evaluation is called in a trace."""


@dataclass
class RequestProfile:
    """What a request's time went to.

    Args:
        result: of the request.
        work: of its steps.
        rates: what the floors are reckoned with.
        classes: milliseconds, launches and floor of every class of kernel in the steps.
        step_seconds: from the first evaluation's beginning to the last one's end, without what lies between them.
        outside_ms: of kernels before the first step, between steps and after the last one.
        trace: Chrome's format.
    """

    result: GenerationResult
    work: StepWork
    rates: Rates
    classes: dict[str, ClassTime]
    step_seconds: float
    outside_ms: float
    trace: bytes = field(repr=False)

    def table(self) -> str:
        """The classes, the longest first, and what the whole came to."""
        lines = [f"{'kernels of the steps':24s} {'ms':>10s} {'launches':>9s} {'floor, ms':>10s} {'of the floor':>12s}"]
        for name, found in self.classes.items():
            share = f"{found['share_of_floor']:.0%}" if "share_of_floor" in found else ""
            lines.append(f"{name:24s} {found['ms']:10.2f} {found['launches']:9.0f} {found['floor_ms']:10.2f} {share:>12s}")
        inside = sum(found["ms"] for found in self.classes.values())
        steps = self.result.parameters["steps_taken"]
        speed = self.work.speed(self.step_seconds, self.rates)
        lines += [
            f"{steps} steps: {1e3 * self.step_seconds:.1f} ms, {inside:.1f} ms of it in kernels; {speed}",
            f"encoders, decoding and all else: {self.outside_ms:.1f} ms in kernels",
            "stages: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.result.timings.items()),
        ]
        return "\n".join(lines) + "\n"

    def write_trace(self, path: Path) -> None:
        """Write the trace, for chrome://tracing or Perfetto.

        Raises:
            OutputError: the file cannot be written.
        """
        write_atomically(path, self.trace)


def profile_request(engine: USOEngine, request: GenerationRequest, on_step: OnStep | None = None) -> RequestProfile:
    """Make a request's pictures twice, the first time to have everything compiled, the second time under the profiler.

    Args:
        engine: that does nothing else meanwhile.
        request: what to make.
        on_step: called after each step, both times.
    """
    transformer, device = engine.pipeline.transformer, engine.device
    rates = known_rates(device, transformer.img_in.weight.dtype)
    engine.generate(request, on_step=on_step)
    # The second time everything is encoded again.
    engine.pipeline.clear_caches()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # The engine computes in threads of its own.
    config = _ExperimentalConfig(profile_all_threads=True)
    with ExitStack() as stack:
        work = stack.enter_context(counted_steps(transformer))
        seconds = stack.enter_context(_marked_steps(transformer, device))
        profiler = stack.enter_context(profile(activities=activities, experimental_config=config))
        result = engine.generate(request, on_step=on_step)
        if on_gpu:
            torch.cuda.synchronize(device)
    inside, outside = split_by_steps(list(profiler.events() or ()), on_gpu=on_gpu)
    floors = floors_by_class(transformer.params, work.sequences.elements(), rates)
    # Taken between evaluations.
    del floors["Euler step"]
    classes = times_by_class(inside, floors)
    return RequestProfile(
        result, work, rates, classes, sum(seconds), sum(found.milliseconds for found in outside.values()), _trace_of(profiler)
    )


@contextmanager
def _marked_steps(transformer: Transformer, device: torch.device) -> Iterator[list[float]]:
    """Name every evaluation in the trace, and time it. The device is waited for around each, so that kernels lie within."""
    seconds: list[float] = []
    running: list[tuple[torch.profiler.record_function, float]] = []

    def begin(module: nn.Module, arguments: tuple[object, ...]) -> None:
        _wait(device)
        mark = torch.profiler.record_function(STEP)
        mark.__enter__()
        running.append((mark, time.perf_counter()))

    def end(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        _wait(device)
        mark, start = running.pop()
        seconds.append(time.perf_counter() - start)
        mark.__exit__(None, None, None)

    hooks = transformer.register_forward_pre_hook(begin), transformer.register_forward_hook(end)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def split_by_steps(events: Sequence[FunctionEvent], *, on_gpu: bool) -> tuple[dict[str, KernelTime], dict[str, KernelTime]]:
    """Kernels' times within the steps' evaluations, and outside; on a CPU operations', without those in them."""
    spans = [(e.time_range.start, e.time_range.end) for e in events if e.name == STEP and not _is_on_gpu(e)]
    inside: dict[str, KernelTime] = {}
    outside: dict[str, KernelTime] = {}
    for event in events:
        if event.name == STEP or _is_on_gpu(event) != on_gpu:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds <= 0:
            continue
        within = any(start <= event.time_range.start and event.time_range.end <= end for start, end in spans)
        found = inside if within else outside
        before = found.get(event.name, KernelTime(0.0, 0))
        found[event.name] = KernelTime(before.milliseconds + microseconds / 1e3, before.launches + 1)
    return inside, outside


def _is_on_gpu(event: FunctionEvent) -> bool:
    return event.device_type == DeviceType.CUDA


def _trace_of(profiler: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()
