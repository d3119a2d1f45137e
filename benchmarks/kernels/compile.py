"""Compile every kernel at every configuration for GPUs that are not here; prints one JSON line each.

python -m benchmarks.kernels.compile [hopper ada ...]      Triton keeps what it compiled in its cache folder.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import cast

from uso_kernels.ahead_of_time import Compiled, compile_launch, standard_launches
from uso_kernels.launch import COMPUTE_CAPABILITIES, SHARED_MEMORY_LIMIT_BYTES, Generation


def compile_share(generation: Generation, share: int, shares: int) -> list[Compiled]:
    """Compile every `shares`-th launch of a generation, beginning with number `share`."""
    cases = list(standard_launches(generation))[share::shares]
    return [compile_launch(name, launch, generation) for name, launch in cases]


def main() -> None:
    wanted = sys.argv[1:] or list(COMPUTE_CAPABILITIES)
    generations = [cast("Generation", name) for name in wanted]
    unknown = set(generations) - set(COMPUTE_CAPABILITIES)
    if unknown:
        raise SystemExit(f"unknown generations {sorted(unknown)}, known are {list(COMPUTE_CAPABILITIES)}")
    workers = 2
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_share, g, share, 4) for g in generations for share in range(4)]
        for future in futures:
            for compiled in future.result():
                line = {**asdict(compiled), "shared_limit_bytes": SHARED_MEMORY_LIMIT_BYTES[compiled.generation]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
