"""Every kernel and configuration compiles for six generations of GPU, without spilling, within shared memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from uso_kernels.ahead_of_time import compile_launch, standard_launches
from uso_kernels.attention.quantize_heads import GENERATIONS
from uso_kernels.example import kernel_modules
from uso_kernels.launch import COMPUTE_CAPABILITIES, Generation, TritonUnavailable, is_interpreting

Record = dict[str, str | int | bool]
Launched = dict[Generation, list[tuple[str, str]]]
STACK_LIMIT_BYTES = {"attention": 64, "int8_matmul": 64, "eight_bit_attention": 16 if triton.__version__ < "3.7" else 0}
ATTENTION = "attention"
EIGHT_BIT_ATTENTION = {
    "_quantize_heads_kernel",
    "_value_amax_kernel",
    "_quantize_values_kernel",
    "_eight_bit_attention_kernel",
}


@pytest.fixture(scope="module")
def records(repository: Path) -> list[Record]:
    """All of them, compiled in a process whose Triton compiles; Triton's own cache makes a second run short."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{repository}:{repository / 'kernels'}"
    command = [sys.executable, "-m", "benchmarks.kernels.compile"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return [json.loads(line) for line in answer.stdout.splitlines()]


@pytest.fixture(scope="module")
def launched() -> Launched:
    """Of every generation the names of the standard launches, and of the functions that they launch."""
    return {
        generation: [(name, launch.kernel.fn.__name__) for name, launch in standard_launches(generation)]  # type: ignore[attr-defined]
        for generation in COMPUTE_CAPABILITIES
    }


def test_every_kernel_compiles_for_every_generation(records: list[Record], launched: Launched) -> None:
    for generation in COMPUTE_CAPABILITIES:
        compiled = [record["name"] for record in records if record["generation"] == generation]
        assert compiled
        assert sorted(compiled, key=str) == sorted(name for name, _ in launched[generation])


def test_no_kernel_of_the_package_is_left_out(launched: Launched) -> None:
    written = {name for module in kernel_modules() for name in vars(module) if re.fullmatch(r"_\w+_kernel", name)}
    assert len(written) >= 14
    for generation in COMPUTE_CAPABILITIES:
        left_out = set() if generation in GENERATIONS else EIGHT_BIT_ATTENTION
        assert {function for _, function in launched[generation]} == written - left_out


def test_nothing_spills(records: list[Record]) -> None:
    spilling = [r for r in records if int(r["stack_bytes"]) > STACK_LIMIT_BYTES.get(str(r["kernel"]), 0)]
    assert spilling == []


def test_shared_memory_fits_and_nothing_needs_scratch(records: list[Record]) -> None:
    assert [r for r in records if int(r["shared_bytes"]) > int(r["shared_limit_bytes"])] == []
    assert [r for r in records if r["scratch_bytes"]] == []


def test_attention_on_hopper_uses_what_hopper_has(records: list[Record]) -> None:
    hopper = [r for r in records if r["generation"] == "hopper" and r["kernel"] == ATTENTION]
    assert all(r["has_wgmma"] for r in hopper)
    by_descriptor = {str(r["name"]): r["has_bulk_tensor_copy"] for r in hopper}
    assert by_descriptor == {name: "strided" not in name for name in by_descriptor}
    assert len(by_descriptor) == 4


def test_int8_products_on_hopper_use_what_hopper_has(records: list[Record]) -> None:
    products = [r for r in records if r["kernel"] == "int8_matmul"]
    assert {str(r["generation"]) for r in products} == set(COMPUTE_CAPABILITIES)
    for record in products:
        assert record["has_wgmma"] == (record["generation"] == "hopper"), record["name"]


def test_eight_bit_attention_on_hopper_uses_what_hopper_has(records: list[Record]) -> None:
    ours = [r for r in records if r["kernel"] == "eight_bit_attention"]
    assert {str(r["generation"]) for r in ours} == set(GENERATIONS)
    for record in ours:
        on_hopper = record["generation"] == "hopper"
        assert (record["has_wgmma"], record["has_bulk_tensor_copy"]) == (on_hopper, on_hopper), record["name"]


@pytest.mark.skipif(not is_interpreting(), reason="Triton compiles in this process")
def test_an_interpreting_process_says_that_it_compiles_nothing() -> None:
    name, launch = next(standard_launches("hopper"))
    with pytest.raises(TritonUnavailable, match="TRITON_INTERPRET"):
        compile_launch(name, launch, "hopper")
