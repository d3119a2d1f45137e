"""What a step costs the host, measured without a GPU: Triton's driver and the libraries' products and attention are replaced.

    python -m benchmarks.step.host_stub

The transformer has the full number of blocks and small matrices on a CPU. Every call of ours goes to its launch as on a GPU;
the driver that launches does nothing, and neither do PyTorch's products, GELU and attention, so what is counted is Python and
the dispatch of allocations and views. Processor time of one thread; what a GPU's own calls cost comes on top (`benchmarks/gpu`
measures it). The same with the text stream beside the image stream counts its Python, and no event of a driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import interleave, write_record
from benchmarks.workload import Workload, random_inputs, random_transformer
from uso_engine.model.params import TransformerParams
from uso_engine.model.side_stream import SideStream
from uso_kernels import operation

from .engine_way import Evaluate, engine_step

DEEP = Workload("deep", TransformerParams(hidden_size=256, num_heads=2), (4, 4), (4, 4), text=16, style=16)
"""The full number of blocks; heads of 128."""


@dataclass
class Launches:
    """Counts what reached the driver, and on which stream."""

    count: int = 0
    stream: int = 0
    """The one that is current."""
    by_stream: Counter[int] = field(default_factory=Counter)


@contextmanager
def stubbed_gpu() -> Iterator[Launches]:
    """Within it, CPU tensors are a Hopper's: kernels are compiled and launched by a driver that does nothing."""
    launches = Launches()
    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.runtime.driver, "_active", _Driver(launches)))
        stack.enter_context(patch.object(operation, "NATIVE_DEVICE", "cpu"))
        stack.enter_context(patch.object(operation, "generation_of", lambda x: "hopper"))
        stack.enter_context(patch("uso_kernels.cpu.multiplies_bfloat16", lambda: True))
        for name in ("addmm", "mm"):
            stack.enter_context(patch.object(torch, name, _unwritten))
        for module in ("linear", "product"):
            stack.enter_context(patch(f"uso_kernels.matmul.{module}.activates_in_product", lambda y: True))
            stack.enter_context(patch(f"uso_kernels.matmul.{module}.activated_product", _unwritten_activated))
        stack.enter_context(patch.object(F, "linear", _unwritten_linear))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q)))
        yield launches


class _Driver:
    """Triton's interface to a driver that loads and launches nothing."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def launcher_cls(self, source: object, metadata: object) -> Any:
        def launch(*arguments: object) -> None:
            self.launches.count += 1
            self.launches.by_stream[int(arguments[3])] += 1  # type: ignore[call-overload]

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.launches.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Stream:
    """A stream that nothing waits for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def record_event(self) -> int:
        """An event that nothing looks at."""
        return self.number

    def wait_event(self, event: object) -> None:
        """It has nothing to wait for."""

    wait_stream = wait_event


class StubbedStreams:
    """Two streams of the stubbed GPU.

    Args:
        launches: where it says which one is current.
    """

    def __init__(self, launches: Launches) -> None:
        self._launches, self._streams = launches, (_Stream(0), _Stream(1))

    def make(self) -> _Stream:
        """The second."""
        return self._streams[1]

    def current(self) -> _Stream:
        """The one that is current."""
        return self._streams[self._launches.stream]

    def is_capturing(self) -> bool:
        """Nothing is recorded."""
        return False

    @contextmanager
    def entered(self, stream: _Stream) -> Iterator[None]:
        """Within it, launches go to a stream."""
        before, self._launches.stream = self._launches.stream, stream.number
        try:
            yield
        finally:
            self._launches.stream = before


def _unwritten(*operands: Tensor, out: Tensor | None = None, **options: object) -> Tensor:
    return operands[-2].new_empty(operands[-2].shape[0], operands[-1].shape[1]) if out is None else out


def _unwritten_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _unwritten_activated(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0]) if out is None else out


def deep_step(beside: SideStream | None = None) -> Evaluate:
    """A step of full depth, with the text stream's work on a second stream or not."""
    device = torch.device("cpu")
    transformer = random_transformer(DEEP.params, device, torch.bfloat16)
    transformer.beside = beside
    latents = torch.zeros(DEEP.grid[0] * DEEP.grid[1], DEEP.params.in_channels, dtype=torch.bfloat16)
    return engine_step(transformer, random_inputs(DEEP, device, torch.bfloat16), latents, (0.5,), "dense")


@torch.no_grad()
def run(rounds: int, out: Path | None) -> dict[str, object]:
    """Measure, and record."""
    device = torch.device("cpu")
    with stubbed_gpu() as launches:
        steps = {"step": deep_step(), "beside": deep_step(SideStream(device, StubbedStreams(launches)))}
        for step in steps.values():
            step()
        launches.count = 0
        steps["step"]()
        count = launches.count
        times = interleave(steps, rounds=rounds, device=device, clock="process")
    record = {"workload": DEEP.name, "device": "stub", "clock": "process", "rounds": rounds, "launches": count}
    record |= {**times["step"], "beside": times["beside"]}
    write_record("host_stub", record, out)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    options = BenchmarkParser(__doc__, "rounds", "out", rounds="20").read(arguments)
    torch.set_num_threads(1)
    print(run(options.rounds, options.out))


if __name__ == "__main__":
    main()
