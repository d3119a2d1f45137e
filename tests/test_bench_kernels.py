"""The benchmarks of kernels run at small size: every kernel, checked against its reference before it is timed."""

import os
import subprocess
import sys
from pathlib import Path

from uso_kernels.example import Size, all_examples

COMMAND = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider", "-q"]


def test_every_kernel_benchmark_runs(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{repository}:{repository / 'kernels'}", "OMP_NUM_THREADS": "1"}
    # Told that it is one of several testing processes, pytest-benchmark measures nothing.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    environment.pop("TRITON_INTERPRET", None)
    bench = repository / "benchmarks" / "kernels" / "bench_kernels.py"
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", str(bench), *COMMAND, "--rows", "64", "--width", "128"],
        env=environment, capture_output=True, text=True, check=False, cwd=repository,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-3000:]
    hot = [example.name for example in all_examples("hopper", Size(32, 256)) if example.is_hot]
    assert len(hot) > 20
    for kernel in (*hot, "attention dense", "attention chunked"):
        assert kernel in answer.stdout, kernel
