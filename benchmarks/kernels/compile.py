"""Compile every kernel at every configuration for GPUs that are not here; prints one JSON line each.

python -m benchmarks.kernels.compile [hopper ada ...]      Triton keeps what it compiled in its cache folder.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from benchmarks.arguments import BenchmarkParser
from uso_kernels.ahead_of_time import Compiled, compile_launch, standard_launches
from uso_kernels.launch import COMPUTE_CAPABILITIES, SHARED_MEMORY_LIMIT_BYTES, Generation


def compile_generation(generation: Generation) -> list[Compiled]:
    """Compile every launch of a generation."""
    return [compile_launch(name, launch, generation) for name, launch in standard_launches(generation)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument(
        "generations", nargs="*", metavar="GENERATION", help=f"of {', '.join(COMPUTE_CAPABILITIES)}; by default all"
    )
    options = parser.read(arguments)
    generations = options.generations or list(COMPUTE_CAPABILITIES)
    if unknown := [name for name in generations if name not in COMPUTE_CAPABILITIES]:
        parser.error(f"unknown generations {unknown}: expected some of {list(COMPUTE_CAPABILITIES)}")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_generation, generations):
            for compiled in found:
                line = {**asdict(compiled), "shared_limit_bytes": SHARED_MEMORY_LIMIT_BYTES[compiled.generation]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
