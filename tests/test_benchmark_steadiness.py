"""What follows for records where a machine did not keep its rate."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.compare.run import done_cases
from benchmarks.compare.tables import NO_GPU, overview
from benchmarks.measure import tree_hash
from benchmarks.records import Record
from benchmarks.turns import is_steady

KEY: dict[str, object] = {"size": "tiny", "ways": ["ours"]}


def record(p80_ms: float, **changed: object) -> Record:
    """Of a case between whose requests the product took 1 ms to so many."""
    product_ms = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": p80_ms}
    return {"benchmark": "compare", "tree": tree_hash(), **KEY, "case": "a", "way": "ours", "product_ms": product_ms, **changed}


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
