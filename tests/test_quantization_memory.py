"""Host memory while quantising gigabytes, measured in a fresh process, and how sensitive each group of layers is."""

import pytest
import torch

from benchmarks.memory.quantizing import measure
from benchmarks.tiers.errors import drawn_case
from benchmarks.tiers.sensitivity import groups_of, sensitivities
from uso_engine.precision.transformer import linears
from uso_engine.verification.small_model import small_params


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["fp8", "int4"])
def test_quantising_two_gigabytes_takes_little_memory(tier: str) -> None:
    (entry,) = measure([tier], double=2, single=3)  # type: ignore[list-item]
    assert float(str(entry["checkpoint_bytes"])) >= 2e9
    assert float(str(entry["peak_above_start_bytes"])) <= 2 * 2**30


def test_groups_hold_every_quantisable_layer() -> None:
    params = small_params(guidance_embed=True)
    groups = groups_of(params)
    assert {name for names in groups.values() for name in names} == set(linears(params)) - {"img_in"}
    assert groups["single_blocks.*.linear2"] == [f"single_blocks.{i}.linear2" for i in range(3)]
    assert len(groups["double_blocks.1"]) == 8


def test_sensitivity_of_one_case() -> None:
    case = drawn_case(3)
    found = list(sensitivities(case.params, [case], [case.source], (), "fp8"))
    errors = {str(entry["group"]): float(str(entry["latent_error"])) for entry in found}
    assert errors.keys() == groups_of(case.params).keys()
    assert all(1e-4 < error < 0.05 for error in errors.values())
    ranks = [float(str(entry["per_share"])) for entry in found]
    assert ranks == sorted(ranks, reverse=True)
    assert torch.tensor(ranks).isfinite().all()
