"""A reference case's run by four processes over gloo: every tensor that `verify` compares is one process's, within rounding.

The cases' own transformer has two heads, which four processes cannot share; this one has four, drawn by the same recipe.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from uso_engine.config import parse_config
from uso_engine.loading.assembly import load_pipeline
from uso_engine.verification import small_model
from uso_engine.verification.case import CaseSettings, read_cases
from uso_engine.verification.measure import relative_error
from uso_engine.verification.run import _run_case


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_every_tensor_of_a_case(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(small_model.small_params(True), num_heads=4, axes_dim=(8, 28, 28))
    monkeypatch.setattr(small_model, "small_params", lambda guidance_embed: params)
    cases, _ = read_cases(Path(__file__).parent / "reference")
    (case,) = (case for case in cases if case.name == "padded_content_and_style")
    assert isinstance(case.settings, CaseSettings)
    written = small_model.write_small_model(case.settings, tmp_path)
    found: list[dict[str, Tensor]] = []
    for count in (1, processes):
        config = parse_config({**dict(written), "parallel": {"ulysses": count, "step_timeout_s": 120.0}})
        pipeline = load_pipeline(config, device="cpu", tier="float32")
        try:
            found.append(_run_case(pipeline, case, case.settings))
        finally:
            pipeline.close()
    alone, together = found
    assert alone.keys() == together.keys() and len(alone) > 15
    for name, expected in alone.items():
        assert relative_error(together[name], expected) < 5e-6, name
