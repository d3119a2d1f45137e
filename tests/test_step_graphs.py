"""Steps as graphs: the bits of steps without, in any company, within their bounds; a failing capture is told, never hidden."""

from __future__ import annotations

import logging

import pytest
import torch
from graphed_denoisers import counts, graphs_of, jobs_of, made, step_often
from random_models import quantise, small_transformer
from repeated_capture import Repeating
from small_requests import SHAPES, HandTurnedLoop, SmallWork, alone, image_jobs
from torch import Tensor, nn

from uso_engine.errors import BackendError, DeviceMemoryError
from uso_engine.model.params import TransformerParams
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling import step_graphs
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.step_graph import CaptureError
from uso_engine.sampling.step_graphs import MIB

CPU = torch.device("cpu")


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_graphs_steps_have_the_bits_of_steps_without(shape: int, negative: bool) -> None:
    """Two steps without, the third is captured, the rest are repetitions; no result is overwritten by a later one."""
    denoiser, graphs, capturing = made()
    plain = Denoiser(denoiser._transformer)
    for turn in range(2):
        jobs, others = (jobs_of(d, shape, images=2, negative=negative) for d in (denoiser, plain))
        kept: list[tuple[Tensor, Tensor]] = []
        for _ in range(6):
            for mine, theirs in zip(denoiser.step(jobs), plain.step(others), strict=True):
                kept.append((mine, theirs))
            kept += [(mine.latent, theirs.latent) for mine, theirs in zip(jobs, others, strict=True)]
        assert all(torch.equal(mine, theirs) for mine, theirs in kept)
        assert not torch.equal(kept[0][0], kept[-4][0])
        # A second request of the same lengths finds the graph.
        assert counts(graphs) == (1, 3 + 6 * turn, 2, 1)
    assert capturing.captured[0].count == 1 + 3 + 6


def test_requests_that_share_a_signature_share_a_graph() -> None:
    """Their prompts, contents and schedules are copied in; company that comes and goes has signatures of its own."""
    denoiser, graphs, _ = made()
    plain = Denoiser(denoiser._transformer)
    (entry,) = image_jobs(denoiser._transformer, 0, 6, negative=True)
    assert entry.negative is not None
    entries = [ImageJob(sequence, entry.latent, entry.sigmas) for sequence in (entry.sequence, entry.negative)]
    assert not torch.equal(entry.sequence.text, entry.negative.text)
    first, second = ([d.begin(each) for each in entries] for d in (denoiser, plain))
    mine, theirs = [*first, *jobs_of(denoiser, 1)], [*second, *jobs_of(plain, 1)]
    for order in ((0,), (0, 2), (1,), (0, 2), (0,), (1,), (1, 2), (1,), (1, 2), (0,)):
        velocities = zip(denoiser.step([mine[i] for i in order]), plain.step([theirs[i] for i in order]), strict=True)
        assert all(torch.equal(one, other) for one, other in velocities)
    # Six steps of one image and four of two: the first two of each without a graph, one each for the capture.
    assert counts(graphs) == (2, 4, 4, 2)


def test_velocities_that_a_caller_keeps_are_not_overwritten() -> None:
    """With the authors' numerics what a step gives back is what the transformer gave."""
    transformer, capturing = small_transformer(), Repeating()
    denoiser, plain = Denoiser(transformer, graphs_of(transformer, capturing)), Denoiser(transformer)
    (entry,) = image_jobs(transformer, 0, 6)
    job, other = (d.begin(entry, reference_numerics=True) for d in (denoiser, plain))
    kept = [(denoiser.step([job])[0], plain.step([other])[0]) for _ in range(6)]
    assert capturing.captured[0].count == 1 + 3
    assert all(torch.equal(mine, theirs) for mine, theirs in kept)
    assert not torch.equal(kept[-1][0], kept[-2][0])


def test_a_loop_with_requests_that_come_go_and_are_cancelled() -> None:
    transformer = small_transformer()
    loop = HandTurnedLoop(transformer)
    graphs = graphs_of(transformer, Repeating())
    loop.machine.denoiser = Denoiser(transformer, graphs)
    works = [SmallWork(image_jobs(transformer, shape, 9, 1)) for shape in (0, 1, 0, 0)]
    requests = []
    for index, work in enumerate(works):
        requests.append(loop.submit(work))
        loop.turn(3)
        if index == 1:
            requests[0].handle.cancel()
    loop.run()
    for request, work in list(zip(requests, works, strict=True))[1:]:
        assert torch.equal(request.latents[0], alone(transformer, work)[0])
    found = graphs.statistics()
    assert found.replayed > 3 and found.captured >= 2
    assert found.captured + found.replayed + found.eager == loop.queue.counters.steps


def test_two_engines_share_nothing() -> None:
    (one, ours, mine), (other, theirs, _) = made(), made()
    for _ in range(2):
        for denoiser in (one, other):
            jobs = jobs_of(denoiser, steps=3)
            for _ in range(3):
                denoiser.step(jobs)
    assert counts(ours) == counts(theirs) == (1, 3, 2, 1)
    mine.faults.append(RuntimeError("operation not permitted when stream is capturing"))
    with pytest.raises(CaptureError):
        step_often(one, 1)
    assert theirs.statistics().failures == ()


def test_graphs_keep_within_their_memory_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used goes first."""
    denoiser, graphs, _ = made(limit_mib=2.5)
    for shape in (0, 1, 0, 2):
        step_often(denoiser, shape)
        assert graphs.held_bytes <= 2.5 * MIB
    assert graphs.statistics().evicted == 1
    before = counts(graphs)
    step_often(denoiser, 0)
    assert counts(graphs) == (before[0], before[1] + 4, before[2], 2)
    step_often(denoiser, 1)
    assert graphs.statistics().captured == 4
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 1)
    step_often(denoiser, 2)
    assert graphs.statistics().kept == 1


def test_a_graph_that_is_larger_than_all_may_be() -> None:
    denoiser, graphs, _ = made("auto", limit_mib=0.5)
    step_often(denoiser, 0, 6)
    found = graphs.statistics()
    assert (found.captured, found.replayed, found.eager, found.held_bytes) == (0, 0, 6, 0)
    assert len(found.failures) == 1 and "cuda_graph_mib is 0.5" in found.failures[0]
    denoiser, graphs, _ = made("on", limit_mib=0.5)
    with pytest.raises(CaptureError, match=r"MiB, cuda_graph_mib is 0\.5; raise it"):
        step_often(denoiser, 0, 6)


def test_a_failing_capture_is_an_error_where_graphs_are_on() -> None:
    """The step is as if it had not been tried, and the request of the loop fails with what to do."""
    transformer, capturing = small_transformer(), Repeating()
    loop = HandTurnedLoop(transformer)
    loop.machine.denoiser = Denoiser(transformer, graphs_of(transformer, capturing))
    capturing.faults.append(RuntimeError("operation not permitted when stream is capturing"))
    request = loop.submit(SmallWork(image_jobs(transformer, 0, 6, 1)))
    loop.run()
    assert isinstance(request.error, BackendError)
    assert "not permitted when stream is capturing" in str(request.error)
    assert 'cuda_graphs = "auto" or "off"' in str(request.error)
    assert isinstance(request.error.__cause__, CaptureError)
    assert loop.queue.counters.steps == 3


def test_a_failing_capture_is_told_once_where_graphs_are_automatic(caplog: pytest.LogCaptureFixture) -> None:
    denoiser, graphs, capturing = made("auto")
    plain = Denoiser(denoiser._transformer)
    capturing.faults.append(RuntimeError("operation not permitted when stream is capturing"))
    jobs, others = jobs_of(denoiser), jobs_of(plain)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert torch.equal(denoiser.step(jobs)[0], plain.step(others)[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without one" in caplog.text and "not permitted" in caplog.text
    found = graphs.statistics()
    assert (found.captured, found.replayed, found.eager) == (0, 0, 6)
    assert found.failures == ("capturing a step failed: operation not permitted when stream is capturing",)
    step_often(denoiser, 1)
    assert graphs.statistics().captured == 1


def test_a_repetition_with_other_bits_is_refused() -> None:
    denoiser, graphs, capturing = made("auto")
    capturing.error = 1e-3
    step_often(denoiser, 0)
    assert graphs.statistics().failures == ("a repetition of the captured step has other bits than the step",)
    assert graphs.statistics().replayed == 0


def test_memory_that_runs_out_in_a_capture() -> None:
    """Other graphs go first; then the step is computed without one, or fails where graphs are on."""
    short = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    denoiser, graphs, capturing = made("auto")
    step_often(denoiser, 0)
    capturing.faults.append(short)
    step_often(denoiser, 1)
    assert (graphs.statistics().captured, graphs.statistics().kept, graphs.statistics().failures) == (2, 1, ())
    capturing.faults += [short, short]
    step_often(denoiser, 2)
    assert graphs.statistics().failures == ("memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB.",)
    assert graphs.statistics().kept == 0
    transformer, capturing = small_transformer(), Repeating()
    loop = HandTurnedLoop(transformer)
    loop.machine.denoiser = Denoiser(transformer, graphs_of(transformer, capturing))
    capturing.faults += [short, short]
    request = loop.submit(SmallWork(image_jobs(transformer, 0, 6, 1)))
    loop.run()
    assert isinstance(request.error, DeviceMemoryError) and "memory_budget_gib" in str(request.error)


def test_memory_that_runs_out_in_a_step_takes_the_graphs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, graphs, _ = made()
    step_often(denoiser, 0)
    assert graphs.held_bytes > 0
    jobs = jobs_of(denoiser, 1)

    def short(*given: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(denoiser._transformer, "forward", short)
        with pytest.raises(torch.OutOfMemoryError):
            denoiser.step(jobs)
    assert graphs.held_bytes == 0 and jobs[0].index == 0


def test_weights_that_are_elsewhere_are_captured_anew() -> None:
    """In place they stay in the graph, as LoRAs are merged; a tier that quantises anew puts them elsewhere."""
    denoiser, graphs, _ = made()
    plain, transformer = Denoiser(denoiser._transformer), denoiser._transformer

    def agree(turns: int) -> None:
        jobs, others = jobs_of(denoiser, steps=turns), jobs_of(plain, steps=turns)
        for _ in range(turns):
            assert torch.equal(denoiser.step(jobs)[0], plain.step(others)[0])

    agree(4)
    with torch.no_grad():
        transformer.get_parameter("double_blocks.0.img_mlp.0.weight").mul_(2)
    agree(4)
    assert counts(graphs) == (1, 5, 2, 1)
    transformer.final_layer.linear.weight = nn.Parameter(3 * transformer.final_layer.linear.weight, requires_grad=False)
    agree(4)
    assert counts(graphs) == (2, 6, 4, 1)
    quantise(transformer, Int8Linear)
    agree(4)
    assert counts(graphs) == (3, 7, 6, 1)


def test_hooks_and_observers_see_every_step() -> None:
    denoiser, graphs, _ = made("auto")
    seen: list[str] = []
    layer = denoiser._transformer.get_submodule("single_blocks.0.linear1")
    handle = layer.register_forward_hook(lambda *given: seen.append("hook"))
    step_often(denoiser, 0, 5)
    assert graphs.statistics().replayed == 0 and len(seen) >= 5 and "hooks" in graphs.statistics().failures[0]
    handle.remove()
    step_often(denoiser, 1, 3)
    denoiser.step(jobs_of(denoiser, 1), lambda name, tensor, layout: seen.append(name))
    assert seen[-1] == "velocity"
    denoiser, *_ = made("on")
    with pytest.raises(BackendError, match="observer"):
        denoiser.step(jobs_of(denoiser), lambda name, tensor, layout: None)


def test_automatic_graphs_are_for_steps_that_keep_the_host_busier(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, graphs, _ = made("auto")
    with monkeypatch.context() as patch:
        patch.setattr(step_graphs, "host_ms", lambda params, sequences: 0.0)
        step_often(denoiser, 0, 5)
    assert counts(graphs) == (0, 0, 5, 0) and graphs.statistics().failures == ()
    step_often(denoiser, 1, 5)
    assert graphs.statistics().captured == 1


def test_what_pays_is_decided_once_for_steps_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, *_ = made("auto")
    asked: list[int] = []

    def host_ms(params: TransformerParams, sequences: int) -> float:
        asked.append(sequences)
        return 0.0

    monkeypatch.setattr(step_graphs, "host_ms", host_ms)
    step_often(denoiser, 0, 8)
    assert asked == [1]
    monkeypatch.setattr(step_graphs, "MOST_REMEMBERED", 1)  # Then the first kind is forgotten for the second.
    step_often(denoiser, 1, 4)
    step_often(denoiser, 0, 3)
    assert asked == [1, 1, 1]


def test_a_graph_outlives_what_is_remembered_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many other kinds of steps come that its count is forgotten; when its weights are replaced it is captured anew."""
    monkeypatch.setattr(step_graphs, "MOST_REMEMBERED", 1)
    denoiser, graphs, _ = made()
    step_often(denoiser, 0, 4)
    step_often(denoiser, 1, 1)
    layer = denoiser._transformer.final_layer.linear
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)
    step_often(denoiser, 0, 4)
    assert counts(graphs) == (2, 2, 5, 1)
