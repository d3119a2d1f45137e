"""The parts of both campaigns, in the order in which they run, with the seconds that each may take.

A part is either a function `run(bench)` of a module beside this file, in a process of its own, or a group of commands that run
beside each other. Limits of a campaign add up to what its command promises, so that no part can take another's time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Literal

Size = Literal["full", "tiny"]
Command = tuple[str, ...]

_CLI = (sys.executable, "-c", "from uso_engine.cli import main; main()")
_GPU_TESTS = (
    "tests/test_example.py",
    "tests/test_hot_loop.py",
    "tests/test_uso_kernels_norms.py",
    "tests/test_uso_kernels_rows.py",
    "tests/test_uso_kernels_qk_norm_rope.py",
    "tests/test_attention.py",
    "tests/test_attention_eight_bit.py",
    "tests/test_quantization_gpu.py::test_gpu_multiplies_what_the_cpu_multiplies",
    "tests/test_placement_gpu.py",
)


@dataclass(frozen=True)
class Part:
    """One part of a campaign.

    Args:
        name: what reports call it.
        limit_s: after so many seconds it is killed.
        commands: by name, run beside each other instead of a module.
        module: whose `run` it is; by default the one of that name beside this file.
    """

    name: str
    limit_s: float
    commands: tuple[tuple[str, Command], ...] = ()
    module: str = ""


def checks(size: Size) -> tuple[tuple[str, Command], ...]:
    """What says whether anything measured afterwards is worth having: native kernels, and reference cases in three ways.

    Without a GPU its tests can only be collected, which shows that they load with what is installed.
    """
    on_gpu = size == "full"
    workers = ("-n", str(max(1, min(8, (os.cpu_count() or 2) - 4)))) if on_gpu and importlib.util.find_spec("xdist") else ()
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "minversion=8.0", "-p", "no:cacheprovider", "--tb=short")
    tests: Command = (*pytest, "-rfE", *workers, *(() if on_gpu else ("--collect-only",)), *_GPU_TESTS)
    verify: Command = (*_CLI, "verify", "tests/reference", "--device", "cuda" if on_gpu else "cpu")
    bf16 = (*verify, "--tier", "bf16")
    triton = (("verify bf16 triton", (*bf16, "--attention", "triton")),) if on_gpu else ()
    return (("tests", tests), ("verify float32", verify), ("verify bf16", bf16), *triton)


def first(size: Size) -> tuple[Part, ...]:
    """What is measured before anything is tuned: at most 530 seconds."""
    return (
        Part("checks", 110, checks(size)),
        Part("rates", 40),
        Part("steps", 150),
        Part("kernel_classes", 30),
        Part("tiers", 55),
        Part("whole_request", 60),
        Part("company", 30),
        Part("host_time", 25),
        Part("memory", 30),
    )


def second(size: Size) -> tuple[Part, ...]:
    """Variants of the step against each other, and requests together: at most 230 seconds."""
    return (Part("variants", 140), Part("small_variants", 45), Part("host_time", 20), Part("together", 25))


CAMPAIGNS = {"first": first, "second": second}
