"""The ladder's first rung is the authors' way, and every rung computes the same velocity."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import plans as memory_plans
from benchmarks.step import against_diffusers, cold_start, ladder
from benchmarks.step.authors_way import AuthorsWay
from benchmarks.step.encode_decode import time_stages
from benchmarks.step.tables import ladder as ladder_table
from benchmarks.tiers import steps as tier_steps
from benchmarks.workload import WORKLOADS, merge, random_inputs, random_lora, random_transformer
from uso_engine.precision.tiers import QUANTIZED_TIERS
from uso_kernels.attention import choose_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("ladder") / "records.jsonl"
    records = ladder.run(WORKLOADS["tiny"], CPU, torch.float32, 1, out)
    assert [json.loads(line)["rung"] for line in out.read_text().splitlines()] == [record["rung"] for record in records]
    return records


def test_every_rung_computes_the_authors_velocity(records: list[dict[str, object]]) -> None:
    differences = {str(record["rung"]): float(str(record["difference"])) for record in records}
    assert len(differences) >= 5
    # Merging LoRA moves float32 by a rounding; what the engine does beyond that is order of summation.
    assert max(differences.values()) < 5e-6
    assert differences["+ fixed work hoisted"] < 1e-6


def test_engine_allocates_less_than_the_authors_way(records: list[dict[str, object]]) -> None:
    allocations = {str(record["rung"]): int(str(record["allocations"])) for record in records}
    # What is left are results of matrix products and what the references of the fused kernels make on a CPU.
    assert allocations["+ attention chosen (auto)"] < 0.75 * allocations["authors' way"]


def test_a_ladder_of_a_machine_that_did_not_keep_its_rate_is_left_out(records: list[dict[str, object]]) -> None:
    def taken(cpu: str, p80_ms: float) -> list[dict[str, Any]]:
        machine = {"cpu": cpu, "cpu_capability": "AVX2", "cpu_flags": []}
        return [{**r, "machine": machine, "product_ms": {"p20_ms": 1.0, "p80_ms": p80_ms}} for r in records]

    told = ladder_table([*taken("steady", 1.1), *taken("unsteady", 1.2)])
    assert told.count("| steady (AVX2) |") == len(records) and "| unsteady" not in told
    assert told.endswith("Left out, unsteady (AVX2): it did not keep its rate.")


def test_a_rung_that_computes_something_else_is_not_timed() -> None:
    right, wrong = torch.ones(3), torch.full((3,), 1.1)
    with pytest.raises(SystemExit, match="do not compute"):
        ladder.check({"first": lambda: right, "second": lambda: wrong}, torch.float32)


def test_lora_matters_to_the_first_rung() -> None:
    """Without its LoRA the authors' way gives another velocity, and with it merged the same."""
    workload = WORKLOADS["tiny"]
    transformer = random_transformer(workload.params, CPU, torch.float32)
    inputs = random_inputs(workload, CPU, torch.float32)
    lora = random_lora(transformer, workload.lora_rank)
    latents = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_lora = AuthorsWay(transformer, inputs, lora=lora).velocity(latents, 0.5)
        without = AuthorsWay(transformer, inputs).velocity(latents, 0.5)
        merge(transformer, lora)
        merged = AuthorsWay(transformer, inputs).velocity(latents, 0.5)
    assert (with_lora - without).norm() > 0.01 * with_lora.norm()
    assert (with_lora - merged).norm() < 5e-6 * with_lora.norm()


def test_steps_against_diffusers_and_from_a_cold_start(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    record = against_diffusers.run(WORKLOADS["tiny"], CPU, torch.float32, 1, out)
    assert float(str(record["difference"])) < 5e-6
    cold = cold_start.run(WORKLOADS["tiny"], CPU, torch.bfloat16, out)
    assert cold["attention"] == (choose_backend(CPU, torch.bfloat16, 1),)
    assert [json.loads(line)["benchmark"] for line in out.read_text().splitlines()] == ["step", "cold_start"]


def test_every_tier_steps_like_bf16(tmp_path: Path) -> None:
    records = tier_steps.run(WORKLOADS["tiny"], CPU, 1, tmp_path / "records.jsonl")
    differences = {str(record["tier"]): float(str(record["difference"])) for record in records}
    assert set(differences) == {*QUANTIZED_TIERS, "int8, W8A8"}
    assert 1e-4 < differences["int8"] < differences["fp8"] < differences["int4"] < 0.1


def test_memory_plans_are_rehearsed_at_small_size() -> None:
    workload, name = WORKLOADS["tiny"], "uso-flux-dev-int8"
    roomy = memory_plans.measure_within(memory_plans.settings_for(name, workload), workload, 8, CPU)
    budget = float(str(roomy["planned_peak_gib"])) - 0.0005
    tight = memory_plans.measure_within(memory_plans.settings_for(name, workload), workload, budget, CPU)
    assert (roomy["streamed"], roomy["moved_gb"]) == ([], 0)
    assert tight["streamed"]
    assert float(str(tight["planned_peak_gib"])) <= budget
    assert float(str(tight["moved_gb"])) > 0


def test_stages_run_at_small_size() -> None:
    names = {str(record["stage"]) for record in time_stages(WORKLOADS["tiny"], CPU, torch.float32, rounds=1)}
    assert {"t5", "clip", "siglip", "autoencoder encode", "admission"} <= names
    assert any(name.startswith("denoising") for name in names)
