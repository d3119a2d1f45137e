"""Our rendering of the authors' way computes what their modules compute, as often as they do."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compare.authors import AuthorsCode, RenderedAuthors
from benchmarks.compare.cases import SIZES
from benchmarks.compare.evaluations import Evaluations
from benchmarks.compare.models import Models
from benchmarks.compare.peers import REFERENCE
from benchmarks.compare.tables import against_code
from benchmarks.step.authors_way import AuthorsWay
from benchmarks.workload import WORKLOADS, random_inputs, random_lora, random_transformer

CPU = torch.device("cpu")
PRODUCTS = ("addmm", "mm", "bmm")
COMPUTED = (*PRODUCTS, "gelu", "mul", "add", "cat", "native_layer_norm", "pow", "mean", "rsqrt", "silu", "_to_copy")
FOLDER = os.environ.get(REFERENCE)


class Counted(TorchDispatchMode):
    """Calls and elements of results, by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*arguments, **(keywords or {}))
        name = str(operation).split(".")[1]
        self.calls[name] += 1
        if isinstance(result, torch.Tensor):
            self.elements[name] += result.numel()
        return result


def counted(compute: Callable[[], object]) -> Counted:
    with torch.no_grad(), Counted() as counts:
        compute()
    return counts


@pytest.fixture(scope="module")
def ways() -> dict[str, Counted]:
    """A step of the tiny model, with its LoRA and without."""
    workload = WORKLOADS["tiny"]
    transformer = random_transformer(workload.params, CPU, torch.float32)
    inputs, lora = random_inputs(workload, CPU, torch.float32), random_lora(transformer, workload.lora_rank)
    latents = torch.zeros(48, 64)
    with_lora = AuthorsWay(transformer, inputs, lora=lora, hoist=True, times=(0.5,))
    without = AuthorsWay(transformer, inputs, hoist=True, times=(0.5,))
    return {
        "LoRA": counted(lambda: with_lora.velocity(latents, 0.5)),
        "none": counted(lambda: without.velocity(latents, 0.5)),
    }


def test_a_single_block_with_a_lora_computes_gelu_and_its_input_twice(ways: dict[str, Counted]) -> None:
    """`SingleStreamBlockLoraProcessor.forward` writes both into each of its two calls of a matrix."""
    params = WORKLOADS["tiny"].params
    assert ways["none"].calls["gelu"] == 2 * params.depth + params.depth_single_blocks
    assert ways["LoRA"].calls["gelu"] == 2 * params.depth + 2 * params.depth_single_blocks
    assert ways["LoRA"].calls["cat"] - ways["none"].calls["cat"] == params.depth_single_blocks


def test_a_lora_adds_two_products_a_sum_and_a_multiplication_by_its_weight(ways: dict[str, Counted]) -> None:
    """To four matrices of a double block and two of a single one, where it sums queries, keys and values alone."""
    workload = WORKLOADS["tiny"]
    params, tokens = workload.params, workload.text + workload.style + 48 + 16
    width = params.hidden_size
    loras = 4 * params.depth + 2 * params.depth_single_blocks
    results = tokens * (3 * width + width) * (params.depth + params.depth_single_blocks)
    for operation in ("mul", "add"):
        assert ways["LoRA"].calls[operation] - ways["none"].calls[operation] == loras
        assert ways["LoRA"].elements[operation] - ways["none"].elements[operation] == results
    products = {way: sum(counts.calls[kind] for kind in PRODUCTS) for way, counts in ways.items()}
    assert products["LoRA"] - products["none"] == 2 * loras


@pytest.mark.skipif(
    FOLDER is None or importlib.util.find_spec("einops") is None, reason=f"{REFERENCE} names no checkout, or einops is missing"
)
def test_the_authors_code_computes_as_much() -> None:
    """Of everything that takes time; they order sines and modulation otherwise."""
    assert FOLDER is not None
    models = Models(SIZES["tiny"], CPU, torch.bfloat16)
    case = models.size.core()[2]
    ours = RenderedAuthors(models, Evaluations(CPU, "wall"), largest_difference=1.0)
    theirs = AuthorsCode(models, Evaluations(CPU, "wall"), largest_difference=1.0, folder=Path(FOLDER))
    ours.request(case, 1)  # Models are made by the first.
    rendered, code = (counted(lambda way=way: way.request(case, 1)) for way in (ours, theirs))  # type: ignore[misc]
    for operation in COMPUTED:
        assert rendered.elements[operation] == pytest.approx(code.elements[operation], rel=0.02), operation
    for operation in (*PRODUCTS, "gelu", "native_layer_norm", "add"):
        assert rendered.calls[operation] == code.calls[operation], operation


def test_the_table_holds_time_and_memory_of_both_against_each_other() -> None:
    machine = {"cpu": "a CPU", "taken": "2026-11-28 12:00:00"}
    common = {"size": "small", "dtype": "bfloat16", "machine": machine, "images": 1, "steps": 2, "tokens": 9, "clock": "wall"}
    found = [("authors' way", "both", 95.0), ("authors' code", "both", 100.0), ("authors' way", "one", 1.0)]
    records = [
        {**common, "case": case, "way": way, "step_ms": {"median_ms": ms}, "image_s": ms / 250, "allocated_mib": 2 * ms + 1}
        for way, case, ms in found
    ]
    assert against_code(records).splitlines()[2:] == ["| a CPU, small, bfloat16 | both | 95 | 100 | 0.950 | 0.950 | 0.950 |"]
