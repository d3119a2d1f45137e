"""The process of one part: imports first, then waits for its turn, then runs, writing its results down as they come.

python -m benchmarks.gpu.bench MODULE OUT {full,tiny} RESULTS.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import interleave, time_once, write_record
from benchmarks.workload import WORKLOADS, Inputs, Workload, random_inputs, random_transformer
from uso_engine.loading.device import let_go
from uso_engine.model.roofline import Tokens
from uso_engine.model.transformer import Transformer
from uso_engine.process_state import clean_process_state
from uso_kernels.attention import available_backends

RECORDS = "records.jsonl"
SIZES = {"full": ("full", "full_512"), "tiny": ("tiny", "tiny")}
"""The workload of a size, and the small one on which the host's time counts."""


@dataclass
class Bench:
    """What a part measures with, and where its results go.

    Args:
        part: its module.
        workload: the model's and the request's sizes.
        small: the same model with a small picture.
        device: the GPU; a CPU rehearses.
        out: folder of the records.
        results_path: JSON of this part, rewritten at every result.
    """

    part: str
    workload: Workload
    small: Workload
    device: torch.device
    out: Path
    results_path: Path
    dtype: torch.dtype = torch.bfloat16
    results: dict[str, object] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """How often a step is timed."""
        return 10 if self.on_gpu else 2

    @property
    def tokens(self) -> Tokens:
        w = self.workload
        return Tokens(w.text, w.style, math.prod(w.grid), math.prod(w.content))

    def backends(self) -> dict[str, str | None]:
        """Attention backends with the reason for each that does not compute here; an interpreted one does not count."""
        found = available_backends(self.device)
        return found if self.on_gpu else {**found, "triton": "Triton kernels run on CUDA"}

    def save(self, name: str, value: object) -> None:
        """Write down one result."""
        self.results[name] = value
        partial = self.results_path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, default=str))
        partial.replace(self.results_path)

    def record(self, benchmark: str, record: Mapping[str, object]) -> None:
        """Write down one record for the documents' tables."""
        write_record(benchmark, {"workload": self.workload.name, "device": self.device.type, **record}, self.out / RECORDS)

    def attempt(self, name: str, make: Callable[[], object]) -> None:
        """Save what a piece of a part finds, or why it found nothing."""
        self.save(name, self.tried(make))

    def tried(self, make: Callable[[], object]) -> object:
        """What a piece finds, or why it found nothing: the part goes on, and fails at its end."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001  whatever it was is this piece's result, and `finish` raises it again
            let_go(error)  # The next piece needs the memory.
            self.failures.append(error)
            return f"FAILED {type(error).__name__}: {textwrap.shorten(str(error), 160)}"

    def finish(self) -> None:
        """Fail if a piece failed.

        Raises:
            ExceptionGroup: everything that did.
        """
        if self.failures:
            raise ExceptionGroup(f"pieces of {self.part} failed", self.failures)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give memory back that nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one run by the clock, everything queued on the device included."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def in_turn(self, variants: Mapping[str, Callable[[], object]], warmup_s: float = 0.3) -> dict[str, dict[str, float]]:
        """Time variants against each other; on a GPU each first runs for a while, until the clock has risen."""
        return interleave(variants, rounds=self.rounds, device=self.device, warmup_s=warmup_s if self.on_gpu else 0.0)

    def median_ms(self, run: Callable[[], object], *, at_once_ms: float = 0.0) -> float:
        """Milliseconds of one call.

        Args:
            run: what to time.
            at_once_ms: so many milliseconds of calls are queued between two events, so that none waits for the host.
        """
        count = 1
        if self.on_gpu and at_once_ms:
            self.synchronize()
            run()
            count = max(1, min(100, round(at_once_ms / max(1e-3, time_once(run, self.device)))))
        return self.in_turn({"": lambda: [run() for _ in range(count)]}, 0.1)[""]["median_ms"] / count

    def model(self, workload: Workload | None = None) -> tuple[Transformer, Inputs, Tensor]:
        """A transformer with random weights, a request without style tokens (diffusers has no place for them) and latents."""
        w = replace(workload or self.workload, style=0, text=self.workload.text + self.workload.style)
        transformer = random_transformer(w.params, self.device, self.dtype)
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(math.prod(w.grid), w.params.in_channels, generator=generator).to(self.device, self.dtype)
        return transformer, random_inputs(w, self.device, self.dtype), latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("out", type=Path)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    run: Callable[[Bench], None] = importlib.import_module(options.module).run
    if sys.stdin.readline() != "go\n":
        raise SystemExit("the campaign that started this part ended")
    device = torch.device("cuda", 0) if options.size == "full" else torch.device("cpu")
    large, small = (WORKLOADS[name] for name in SIZES[options.size])
    bench = Bench(options.module, large, small, device, options.out, options.results)
    with clean_process_state(), torch.no_grad():
        run(bench)
    bench.finish()


if __name__ == "__main__":
    main()
