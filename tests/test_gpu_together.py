"""Sixteen requests against one, as the second campaign measures them: the scheduler's company, and bits."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import together
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.company import job
from benchmarks.workload import WORKLOADS
from uso_engine.queue_limits import QueueLimits
from uso_engine.sampling.denoiser import Denoiser

TINY = WORKLOADS["tiny"]


def test_sixteen_requests_take_a_step_each_in_the_schedulers_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more tokens in a step than it has room for; company that changes bits is a failure of the part."""
    bench = Bench("together", TINY, TINY, torch.device("cpu"), tmp_path, tmp_path / "together.json")
    transformer = bench.model()[0]
    denoiser = Denoiser(transformer)
    jobs = [denoiser.begin(job(bench, transformer, together.without_references(TINY), seed)) for seed in range(16)]
    monkeypatch.setattr(together, "QueueLimits", lambda: QueueLimits(max_step_tokens=3 * jobs[0].image.tokens))
    groups = list(together.shared_steps(jobs))
    assert [len(group) for group in groups] == [3, 3, 3, 3, 3, 1]
    assert {id(one) for group in groups for one in group} == {id(one) for one in jobs}
    with torch.no_grad():
        together.same_bits(denoiser, groups, jobs)
        taken = denoiser.step
        monkeypatch.setattr(denoiser, "step", lambda jobs: [len(jobs) * velocity for velocity in taken(jobs)])
        with pytest.raises(ValueError, match="company changes bits: alone"):
            together.same_bits(denoiser, groups, jobs)
