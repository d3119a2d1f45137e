"""Whether a machine kept its rate from before the first request to after the last, and what follows where it did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.compare.run import done_cases
from benchmarks.compare.steadiness import Product, between, is_steady, spread
from benchmarks.compare.tables import NO_GPU, overview
from benchmarks.measure import interleave, tree_hash
from benchmarks.records import Record

CPU = torch.device("cpu")
KEY: dict[str, object] = {"size": "tiny", "ways": ["ours"]}


def record(p80_ms: float, **changed: object) -> Record:
    """Of a case between whose requests the product took 1 ms to so many."""
    product_ms = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": p80_ms}
    return {"benchmark": "compare", "tree": tree_hash(), **KEY, "case": "a", "way": "ours", "product_ms": product_ms, **changed}


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_product_is_timed_before_between_and_after_all_requests(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns next to each other would say nothing of the time that the requests took."""
    monkeypatch.setattr(Product, "_multiply", lambda self: seen.append("product"))
    seen: list[str] = []
    product = Product(CPU, torch.float32, "wall")
    assert seen.pop() == "product"  # The first is not timed.
    turns = between({"one": lambda: seen.append("one"), "other": lambda: seen.append("other")}, product)
    interleave(turns, rounds=rounds, device=CPU)
    there = ["product", "one", "product", "other", "product"]
    assert seen == [name for turn in range(rounds) for name in (there[::-1] if turn % 2 else there)]
    assert len(product._times) == 3 * rounds


def test_a_turn_is_several_products_of_the_ways_type() -> None:
    product = Product(CPU, torch.float64, "process")
    assert {operand.dtype for operand in product._operands} == {torch.float64}
    product._times = [3.0, 1.0, 2.0, 1.0, 9.0, 1.0]
    assert product.summary() == {"median_ms": 1.5, "p20_ms": 1.0, "p80_ms": 3.0}
    assert spread(product.summary()) == 3
    product.run()
    assert product._times[-1] > 0


def test_a_case_of_a_machine_that_did_not_keep_its_rate_is_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    assert not is_steady(record(1.2)) and is_steady(record(1.1)) and not is_steady(record(float("nan")))
    out.write_text(f"{json.dumps(record(1.2))}\n")
    assert done_cases(out, KEY) == set()
    out.write_text(f"{json.dumps(record(1.2))}\n{json.dumps(record(1.1))}\n")
    assert done_cases(out, KEY) == {"a"}


def test_a_gpus_record_that_is_left_out_is_here() -> None:
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "", "cpu_capability": "", "cpu_flags": []}
    shared = {"machine": machine, "device": "cuda", "dtype": "bfloat16"}
    told = overview([record(2.0, **shared)])
    assert "Left out" in told and NO_GPU not in told
    assert NO_GPU in overview([])
