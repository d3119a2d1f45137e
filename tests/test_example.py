"""Every operation has examples, and at every example its interpreted kernel does what its reference does."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType

import pytest
import torch
from kernel_runs import check_error, run_kernel
from torch import Tensor
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS, OpCheckError

from uso_engine.verification.measure import relative_error
from uso_kernels import cpu
from uso_kernels.attention.quantize_heads import GENERATIONS
from uso_kernels.example import Example, Size, all_examples, kernel_modules
from uso_kernels.launch import COMPUTE_CAPABILITIES, Generation, generation_of
from uso_kernels.operation import OPERATIONS, Operation

EIGHT_BIT_ATTENTION = {"quantize_heads_into", "value_amax_into", "quantize_values_into", "eight_bit_attention_into"}
SMALL = Size(rows=32, width=128, dtype=torch.float32)
ODD = Size(rows=48, width=384, dtype=torch.float32)
"""No power of two: the last block of a row, and of rows, has to be masked."""


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
    missing = set() if COMPUTE_CAPABILITIES[generation] >= 89 else {"scaled_matmul_into"}
    missing |= set() if generation in GENERATIONS else EIGHT_BIT_ATTENTION
    assert without_examples(generation) == missing
    for module, value in found:
        if value.describe is not None and value.name not in missing:
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


def cases(size: Size) -> Iterator[Example]:
    """Examples with a Triton kernel; those of a fixed width are among the small ones."""
    return (e for e in all_examples("hopper", size) if e.operation.describe is not None and (size is not ODD or e.is_hot))


def fresh(example: Example) -> tuple[object, ...]:
    """The operands, those that are written in copies."""
    writes = example.operation.writes
    return tuple(
        operand.clone() if i in writes and isinstance(operand, Tensor) else operand
        for i, operand in enumerate(example.operands)
    )


def written(example: Example, operands: tuple[object, ...]) -> list[Tensor]:
    """What the operation has filled, of operands as `fresh` gives them."""
    chosen = (operands[i] for i in example.operation.writes)
    return [operand for operand in chosen if isinstance(operand, Tensor)]


def has_odd_length(example: Example) -> bool:
    """Whether what it fills has both a row length and a number of rows that are no powers of two."""
    lengths = [length for tensor in written(example, example.operands) for length in tensor.shape]
    return any(length & (length - 1) for length in lengths)


def test_every_kernel_has_an_example_of_odd_lengths() -> None:
    odd = {example.operation.name for example in cases(ODD) if has_odd_length(example)}
    assert odd == {name for name, value in OPERATIONS.items() if value.describe is not None}
    assert not any(map(has_odd_length, (e for e in cases(SMALL) if e.operation.name == "euler_update_into")))


def test_every_example_keeps_torchs_rules() -> None:
    """What `writes` leaves out is found at every example; what depends on the declaration alone, once for each operation."""
    torch.manual_seed(0)
    seen: set[str] = set()
    for example in all_examples("hopper", SMALL):
        if any(isinstance(operand, Tensor) and operand.dtype == torch.float8_e4m3fn for operand in example.operands):
            checks: tuple[str, ...] = ("test_faketensor",)  # A CPU neither multiplies nor compares float8.
        elif example.operation.name in seen:
            checks = ("test_schema", "test_faketensor")
        else:
            checks = tuple(DEFAULT_TEST_UTILS)
        seen.add(example.operation.name)
        torch.library.opcheck(example.operation.op, fresh(example), test_utils=checks)
    assert seen == set(OPERATIONS)


def test_what_an_operation_writes_unsaid_is_found() -> None:
    with pytest.raises(OpCheckError, match="mutat"):
        torch.library.opcheck(forgetful, (torch.ones(3), torch.zeros(3)), test_utils=("test_schema",))


@torch.library.custom_op("tests::forgetful", mutates_args=())
def forgetful(x: Tensor, out: Tensor) -> None:
    """Writes what it does not declare, as an operation whose `writes` is short."""
    out.copy_(x)


HALF = replace(SMALL, dtype=torch.float16)
# Each kernel in both types: in float16 at powers of two, in float32 at odd lengths, but for what has a width of its own.
CASES = [(HALF, e.name) for e in cases(HALF)]
CASES += [(SMALL, e.name) for e in cases(SMALL) if not e.is_hot] + [(ODD, e.name) for e in cases(ODD)]
CASE_IDS = [f"{size.dtype} {size.rows}x{size.width} {name}" for size, name in CASES]


def test_names_are_unique() -> None:
    for generation in COMPUTE_CAPABILITIES:
        names = [example.name for example in all_examples(generation, SMALL)]
        assert len(names) == len(set(names))


@lru_cache
def examples_of(size: Size) -> dict[str, Example]:
    """By name; what is read is made once."""
    return {example.name: example for example in all_examples("hopper", size)}


@pytest.mark.parametrize(("size", "name"), CASES, ids=CASE_IDS)
def test_interpreted_kernel_does_what_its_reference_does(size: Size, name: str) -> None:
    """Memory for results begins as NaN, so nothing is left unwritten."""
    torch.manual_seed(0)
    example = examples_of(size)[name]
    kernel, eager, truth = fresh(example), fresh(example), tuple(map(widened, fresh(example)))
    run_kernel(example.operation, *kernel)
    for run, operands in ((example.operation.reference, eager), (example.operation.reference, truth)):
        run(*operands)
    for result, plain, true in zip(*(written(example, given) for given in (kernel, eager, truth)), strict=True):
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


def wrong_examples(module: ModuleType, generation: Generation, size: Size) -> list[str]:
    """A module's examples whose kernel does not what the reference does, straight from a call and through the operator, which
    must give the same bits; each with what is wrong, since who sees it may not be able to look again."""
    found = []
    for example in module.examples(generation, size):
        try:
            straight, operator, eager = (fresh(example) for _ in range(3))
            example.operation(*straight)
            example.operation.op(*operator)
            example.operation.reference(*eager)
            for result, again, plain in zip(*(written(example, given) for given in (straight, operator, eager)), strict=True):
                assert torch.equal(result.view(torch.uint8), again.view(torch.uint8)), "other bits through the operator"
                error = relative_error(result.float(), plain.float())
                assert error < 0.01, f"off by {error:.3g}"
        except Exception as error:  # noqa: BLE001  of any type: a launch that fails says nothing of the others
            found.append(f"{example.name}: {type(error).__name__}: {str(error).strip()[:300]}")
    return found


MODULES = [module for module in kernel_modules() if hasattr(module, "examples")]


@pytest.mark.gpu
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.removeprefix("uso_kernels."))
@torch.no_grad()
def test_native_kernels_do_what_their_references_do(module: ModuleType) -> None:
    """A module at a time, so that several processes compile them."""
    torch.manual_seed(0)
    generation = generation_of(torch.zeros(1, device="cuda"))
    assert wrong_examples(module, generation, Size(rows=2048, device="cuda")) == []


class Pretended:
    """An operation whose kernel and operator are given."""

    writes = (1,)

    def __init__(self, kernel: Callable[[Tensor, Tensor], object], op: Callable[[Tensor, Tensor], object]) -> None:
        self.kernel, self.op = kernel, op

    def __call__(self, x: Tensor, out: Tensor) -> None:
        self.kernel(x, out)

    def reference(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)


def test_every_wrong_example_is_named() -> None:
    def fail(x: Tensor, out: Tensor) -> None:
        raise RuntimeError("out of resource: shared memory")

    copy, double = (lambda x, out: out.copy_(x)), (lambda x, out: out.copy_(2 * x))

    def examples(generation: Generation, size: Size) -> Iterator[Example]:
        pairs = {"fails": (fail, copy), "sound": (copy, copy), "wrong": (double, double), "apart": (copy, double)}
        for name, (kernel, op) in pairs.items():
            operands = (torch.ones(4), torch.zeros(4))
            yield Example(name, Pretended(kernel, op), operands)  # type: ignore[arg-type]

    module = ModuleType("pretended")
    module.examples = examples  # type: ignore[attr-defined]
    found = wrong_examples(module, "hopper", SMALL)
    assert [line.split("\n")[0] for line in found] == [
        "fails: RuntimeError: out of resource: shared memory",
        "wrong: AssertionError: off by 1",
        "apart: AssertionError: other bits through the operator",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_has_the_same_bits_in_blocks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    many, seen = replace(ODD, dtype=dtype), set()
    for example in all_examples("hopper", many):
        if example.operation.describe is None:
            continue
        filled = []
        for numbers in (2**30, 1):
            monkeypatch.setattr("uso_kernels.cpu.BLOCK_NUMBERS", numbers)
            with torch.no_grad(), count_blocks(monkeypatch) as blocks:
                operands = fresh(example)
                example.operation.reference(*operands)
            filled.append([tensor.view(torch.uint8) for tensor in written(example, operands)])
            if blocks:
                assert (max(blocks) > 1) == (numbers == 1), example.name
                seen.add(example.operation.name)
        assert all(map(torch.equal, *filled)), example.name
    assert seen == {
        "gated_residual_into",
        "gelu_concat_into",
        "layer_norm_modulate_into",
        "qk_norm_rope_into",
        "quantize_rows_into",
    }


@contextmanager
def count_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks of each call of `row_blocks`."""
    found: list[int] = []

    def counted(x: Tensor, width: int) -> Sequence[slice]:
        blocks = cpu.row_blocks(x, width)
        found.append(len(blocks))
        return blocks

    with monkeypatch.context() as patched:
        for module in kernel_modules():
            if hasattr(module, "row_blocks") and module is not cpu:
                patched.setattr(module, "row_blocks", counted)
        yield found


def test_where_autograd_records_all_rows_are_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep every block's intermediates, and a backward pass would go through them one by one."""
    monkeypatch.setattr("uso_kernels.cpu.BLOCK_NUMBERS", 1)
    x = torch.zeros(48, 8)
    assert [block.indices(48)[:2] for block in cpu.row_blocks(x, 8)] == [(0, 48)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert [block.indices(48)[:2] for block in cpu.row_blocks(x, 8)] == [(0, 16), (16, 32), (32, 48)]
            assert list(cpu.row_blocks(x[:0], 8)) == []
            assert len(cpu.row_blocks(x.to("meta"), 8)) == 1
