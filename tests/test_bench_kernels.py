"""The benchmarks of kernels run at small size: every kernel, checked against its reference before it is timed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.bench_kernels import TOLERANCE, agree, cases
from benchmarks.kernels.eight_bit_rounding import rounding_of_attention
from uso_engine.verification.measure import relative_error
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


@pytest.mark.parametrize(("rows", "width"), [(64, 128), (256, 256), (1024, 128)])
@torch.no_grad()
def test_eight_bit_attention_is_as_far_off_as_its_rounding_makes_probable(rows: int, width: int) -> None:
    case = cases(rows, width)["attention 8bit"]
    result, plain = case.ours(*case.copy()), case.plain(*case.copy())
    assert isinstance(result, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    probable = rounding_of_attention(*case.operands[:3])  # type: ignore[arg-type]
    assert 0.8 < relative_error(result, plain) / probable < 1.25
    agree(case)


@pytest.mark.parametrize("fault", [lambda x: x * 1.02, lambda x: x.roll(1, 0), torch.zeros_like, lambda x: x * float("nan")])
@torch.no_grad()
def test_eight_bit_attention_that_is_wrong_is_not_timed(fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A scale that is off by 2 % is within what the order of sums may cost others, and not within rounding."""
    case = cases(1024, 128)["attention 8bit"]
    assert case.rounding is not None and 2 * case.rounding(*case.operands[:3]) < TOLERANCE / 2  # type: ignore[arg-type]

    def wrong(*operands: object) -> torch.Tensor:
        result = case.ours(*operands)
        assert isinstance(result, torch.Tensor)
        return fault(result)

    with pytest.raises(AssertionError, match="relative error"):
        agree(case._replace(ours=wrong))
