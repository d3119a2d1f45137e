"""The first step of a process that has compiled nothing yet, and the peak of its memory against the formula."""

from __future__ import annotations

import os
import tempfile

from benchmarks.step import cold_start

from .bench import RECORDS, Bench


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        record = cold_start.run(bench.workload, bench.device, bench.dtype, bench.out / RECORDS)
    for name in ("first_step_s", "second_step_s", "attention", "peak_gib", "formula_gib"):
        bench.save(name, record.get(name))
