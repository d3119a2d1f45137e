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


def compile_share(generation: Generation, share: int, shares: int) -> list[Compiled]:
    """Compile every `shares`-th launch of a generation, beginning with number `share`."""
    cases = list(standard_launches(generation))[share::shares]
    return [compile_launch(name, launch, generation) for name, launch in cases]


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
        futures = [pool.submit(compile_share, generation, share, 4) for generation in generations for share in range(4)]
        for future in futures:
            for compiled in future.result():
                line = {**asdict(compiled), "shared_limit_bytes": SHARED_MEMORY_LIMIT_BYTES[compiled.generation]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
