"""Every operation has examples, and at every example its interpreted kernel does what its reference does."""

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from kernel_runs import check_error, run_kernel
from torch import Tensor

from uso_engine.verification.measure import relative_error
from uso_kernels.example import Example, Size, all_examples, kernel_modules
from uso_kernels.launch import COMPUTE_CAPABILITIES, Generation, generation_of
from uso_kernels.operation import OPERATIONS, Operation

SMALL = Size(rows=32, width=128, dtype=torch.float32)


def declared() -> Iterator[tuple[ModuleType, Operation]]:
    """Every operation with the module that declares it."""
    for module in kernel_modules():
        for value in vars(module).values():
            if isinstance(value, Operation) and value.reference.__module__ == module.__name__:
                yield module, value


def without_examples(generation: Generation) -> set[str]:
    """Operations that no example calls."""
    called = {example.operation.name for example in all_examples(generation, SMALL)}
    return set(OPERATIONS) - called


@pytest.mark.parametrize("generation", COMPUTE_CAPABILITIES)
def test_every_operation_has_examples(generation: Generation) -> None:
    found = list(declared())
    assert {value.name for _, value in found} == set(OPERATIONS)
    assert len(found) >= 11
    has_fp8 = COMPUTE_CAPABILITIES[generation] >= 89
    assert without_examples(generation) == (set() if has_fp8 else {"scaled_matmul_into"})
    for module, value in found:
        if value.describe is not None:
            own = [e for e in module.examples(generation, SMALL) if e.operation is value]
            assert any(e.is_hot for e in own), value.name


def test_an_operation_without_examples_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = next(module for module in kernel_modules() if hasattr(module, "examples"))
    monkeypatch.delattr(module, "examples")
    assert without_examples("hopper") == {value.name for owner, value in declared() if owner is module}


def test_every_kernel_is_launched_by_an_example() -> None:
    written = {name for module in kernel_modules() for name in vars(module) if re.fullmatch(r"_\w+_kernel", name)}
    launched = [e.launch("hopper") for e in all_examples("hopper", SMALL) if e.operation.describe is not None]
    assert {launch.kernel.fn.__name__ for launch in launched} == written  # type: ignore[attr-defined]


def test_only_the_float8_product_is_a_librarys() -> None:
    """All others have a Triton kernel, which the interpreter runs."""
    kernel_modules()
    assert {name for name, value in OPERATIONS.items() if value.describe is None} == {"scaled_matmul_into"}


CASES = [e for e in all_examples("hopper", SMALL) if e.operation.describe is not None]


def test_names_are_unique() -> None:
    for generation in COMPUTE_CAPABILITIES:
        names = [example.name for example in all_examples(generation, SMALL)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_kernel_does_what_its_reference_does(case: Example, dtype: torch.dtype) -> None:
    """Memory for results begins as NaN, so nothing is left unwritten."""
    torch.manual_seed(0)
    size = Size(SMALL.rows, SMALL.width, dtype)
    example = next(e for e in all_examples("hopper", size) if e.name == case.name.replace("float32", str(dtype).split(".")[1]))
    kernel, eager, truth = example.fresh(), example.fresh(), tuple(map(widened, example.fresh()))
    run_kernel(example.operation, *kernel)
    for run, operands in ((example.operation.reference, eager), (example.operation.reference, truth)):
        run(*operands)
    for result, plain, true in zip(*map(example.written, (kernel, eager, truth)), strict=True):
        if result.dtype.itemsize == 1:
            # Values on the border between two numbers may fall on either side.
            assert (result.float() == true.float()).float().mean() > 0.99
            assert (result.float() - true.float()).abs().max() <= (2 if result.dtype == torch.int8 else 32)
        else:
            check_error(result, plain, true)


def widened(operand: object) -> object:
    """Floats in float64; 8-bit floats, and the float16 scales of 4-bit weights, are what they are."""
    if isinstance(operand, Tensor) and operand.dtype in (torch.float32, torch.float16):
        return operand.double()
    return operand


@pytest.mark.gpu
@torch.no_grad()
def test_native_kernels_do_what_their_references_do() -> None:
    """Straight from a call, and through the operator, which must give the same bits."""
    torch.manual_seed(0)
    generation = generation_of(torch.zeros(1, device="cuda"))
    for example in all_examples(generation, Size(rows=2048, device="cuda")):
        straight, operator, eager = (example.fresh() for _ in range(3))
        example.operation(*straight)
        example.operation.op(*operator)
        example.operation.reference(*eager)
        for result, again, plain in zip(*map(example.written, (straight, operator, eager)), strict=True):
            assert torch.equal(result.view(torch.uint8), again.view(torch.uint8)), example.name
            assert relative_error(result.float(), plain.float()) < 0.01, example.name
