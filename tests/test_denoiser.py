"""The denoising loop: company, true CFG, stopping and changing a run."""

from collections import Counter
from typing import Any

import pytest
import torch
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from recorded_shapes import Shapes

from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer
from uso_engine.precision.fp8_linear import Fp8Linear, Fp8WeightLinear
from uso_engine.precision.int4_linear import Int4Linear
from uso_engine.precision.int8_linear import Int8Linear, Int8WeightLinear
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise, pack_latent, unpack_latent
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.step import Step
from uso_kernels.attention import BackendUnavailable

# Grid, text tokens, style tokens, content latents: aligned and padded, with and without references.
SHAPES = [((4, 4), 32, 0, ()), ((3, 5), 21, 24, ((6, 10),)), ((1, 3), 5, 0, ((2, 2), (4, 6))), ((8, 6), 40, 3, ())]


def job(transformer: Transformer, index: int, seed: int = 3) -> ImageJob:
    grid, text, style, contents = SHAPES[index]
    conditions = drawn_conditions(SMALL, seed=index, text=text, style=style, contents=contents)
    return ImageJob(drawn_sequence(transformer, grid, conditions), draw_noise(16 * grid[1], 16 * grid[0], seed), SIGMAS)


def latents(transformer: Transformer, jobs: list[ImageJob]) -> list[torch.Tensor]:
    denoiser = DenoisingRun(transformer, jobs)
    denoiser.run()
    return denoiser.latents()


def check_company(transformer: Transformer) -> None:
    """Every image's bits are the same in small and large companies and in any place, as alone."""
    jobs = [job(transformer, i) for i in range(len(SHAPES))]
    alone = [latents(transformer, [entry])[0] for entry in jobs]
    for order in ([0, 1, 2, 3], [3, 1], [2, 2, 0, 1], [1, 0]):
        together = latents(transformer, [jobs[i] for i in order])
        for position, i in enumerate(order):
            assert torch.equal(together[position], alone[i]), f"image {i} differs in the company {order}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_company_does_not_change_a_bit(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_company(small_transformer(dtype=dtype))
    finally:
        torch.set_num_threads(before)


def test_company_of_other_lengths_changes_no_bit_where_lengths_choose_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: two of these sequences are long, two are not, and the backends' bits differ."""
    found: list[str] = []

    def choose(device: torch.device, dtype: torch.dtype, length: int) -> str:
        found.append("dense" if length >= 60 else "chunked")
        return found[-1]

    monkeypatch.setattr("uso_kernels.attention.choose_backend", choose)
    transformer = small_transformer(dtype=torch.bfloat16)
    check_company(transformer)
    assert set(found) == {"dense", "chunked"}
    pair = DenoisingRun(transformer, [job(transformer, 0), job(transformer, 1)])
    assert transformer.attention_backends(pair.batch) == ("chunked", "dense")


KINDS = [None, Fp8Linear, Fp8WeightLinear, Int8Linear, Int8WeightLinear, Int4Linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__ if kind else "float")
def test_company_does_not_change_what_a_library_is_handed(kind: type[QuantizedLinear] | None, dtype: torch.dtype) -> None:
    """The shapes of all products are those of images alone: no library can order an image's sums by its company."""
    transformer = small_transformer(dtype=dtype)
    if kind is not None:
        quantise(transformer, kind)
    jobs = [guided(transformer, 0, 2.0), *(job(transformer, i) for i in range(1, len(SHAPES)))]
    found: list[Shapes] = []
    for company in (jobs, *([entry] for entry in jobs)):
        denoiser = DenoisingRun(transformer, company)
        with Shapes() as shapes:
            denoiser.step()
        found.append(shapes)
    together, *alone = found
    assert sum(together.found.values()) > 20
    assert together.found == sum((shapes.found for shapes in alone), Counter())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_processs_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Another thread may set it at any moment: libraries do so while they load a model."""
    transformer = small_transformer()

    def made() -> torch.Tensor:
        return latents(transformer, [guided(transformer, 1, 2.0), job(transformer, 3)])[0]

    expected = made()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(made(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_images_differ_by_their_noise_only() -> None:
    transformer = small_transformer()
    jobs = [job(transformer, 1, seed) for seed in (5, 6)]
    first, second = latents(transformer, jobs)
    assert not torch.equal(first, second)
    assert torch.equal(latents(transformer, [job(transformer, 1, 6)])[0], second)


def test_euler_steps_add_up() -> None:
    transformer = small_transformer()
    entry = job(transformer, 0)
    denoiser = DenoisingRun(transformer, [entry])
    expected = entry.latent.double()
    while denoiser.index < denoiser.steps:
        step = denoiser.step()
        width = step.next_sigmas[0] - step.sigmas[0]
        expected = expected + width * unpack_latent(step.velocities[0].double(), step.grids[0])
        assert torch.allclose(step.unpacked(0).double(), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="all 3 steps are taken"):
        denoiser.step()


def negative(transformer: Transformer, index: int) -> Sequence:
    grid, text, style, contents = SHAPES[index]
    return drawn_sequence(
        transformer, grid, drawn_conditions(SMALL, seed=100 + index, text=text, style=style, contents=contents)
    )


def guided(transformer: Transformer, index: int, scale: float) -> ImageJob:
    plain = job(transformer, index)
    return ImageJob(plain.sequence, plain.latent, plain.sigmas, negative(transformer, index), scale)


def test_true_cfg_goes_from_the_negative_towards_the_prompt() -> None:
    transformer = small_transformer()
    plain, against = job(transformer, 1), negative(transformer, 1)
    first = DenoisingRun(transformer, [plain]).step().velocities[0]
    other = DenoisingRun(transformer, [ImageJob(against, plain.latent, SIGMAS)]).step().velocities[0]
    for scale in (0.0, 1.0, 2.5):
        velocity = DenoisingRun(transformer, [guided(transformer, 1, scale)]).step().velocities[0]
        assert torch.allclose(velocity, other + scale * (first - other), atol=1e-5)


def test_true_cfg_of_some_images_leaves_the_others_alone() -> None:
    transformer = small_transformer()
    jobs = [job(transformer, 0), guided(transformer, 1, 2.0), job(transformer, 2), guided(transformer, 3, 3.0)]
    together = latents(transformer, jobs)
    for entry, latent in zip(jobs, together, strict=True):
        assert torch.equal(latent, latents(transformer, [entry])[0])


def test_images_may_have_schedules_of_their_own() -> None:
    transformer = small_transformer()
    base = job(transformer, 0)
    slow = ImageJob(base.sequence, base.latent, (1.0, 0.9, 0.8, 0.7))
    together = latents(transformer, [base, slow])
    assert torch.equal(together[0], latents(transformer, [base])[0])
    assert torch.equal(together[1], latents(transformer, [slow])[0])
    assert not torch.equal(together[0], together[1])


def test_on_step_may_change_the_latent_and_stop() -> None:
    transformer = small_transformer()
    seen: list[int] = []

    def halve_then_stop(step: Step) -> None:
        seen.append(step.index)
        step.latents[0].mul_(0.5)
        if step.index == 1:
            step.stop()

    changed = DenoisingRun(transformer, [job(transformer, 0)])
    changed.run(halve_then_stop)
    assert seen == [0, 1]
    manual = DenoisingRun(transformer, [job(transformer, 0)])
    for _ in range(2):
        manual.step().latents[0].mul_(0.5)
    assert torch.equal(changed.latents()[0], manual.latents()[0])


def test_on_step_may_cancel_by_raising() -> None:
    transformer = small_transformer()

    def cancel(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DenoisingRun(transformer, [job(transformer, 0)]).run(cancel)


def test_on_step_may_keep_velocities() -> None:
    transformer = small_transformer()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    denoiser = DenoisingRun(transformer, [job(transformer, 0)])
    before = [denoiser.latents()[0]]

    def collect(step: Step) -> None:
        kept.append((step.velocities[0], (step.next_sigmas[0] - step.sigmas[0]) * step.velocities[0]))
        before.append(step.unpacked(0))

    denoiser.run(collect)
    for i, (velocity, change) in enumerate(kept):
        assert torch.allclose(change, velocity * (SIGMAS[i + 1] - SIGMAS[i]))
        moved = pack_latent(before[i + 1]) - pack_latent(before[i])
        assert torch.allclose(moved, change, atol=1e-5)


def test_on_step_may_keep_latents() -> None:
    transformer = small_transformer()
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def collect(step: Step) -> None:
        kept.append(step.latents[0])
        copies.append(step.latents[0].clone())
        if step.index:
            kept[step.index - 1].zero_()  # That step is over: this changes what was kept, not the run.

    denoiser = DenoisingRun(transformer, [job(transformer, 0)])
    denoiser.run(collect)
    assert len({copy.numpy().tobytes() for copy in copies}) == len(SIGMAS) - 1
    assert torch.equal(kept[-1], copies[-1])
    assert torch.equal(unpack_latent(kept[-1], (4, 4)), denoiser.latents()[0])
    assert torch.equal(denoiser.latents()[0], latents(transformer, [job(transformer, 0)])[0])


def test_on_step_may_put_other_latents_in_place() -> None:
    transformer = small_transformer()

    def write(step: Step) -> None:
        step.latents[0].mul_(0.5)

    def replace(step: Step) -> None:
        step.latents = tuple(latent * 0.5 for latent in step.latents)

    written, replaced = (DenoisingRun(transformer, [job(transformer, 0)]) for _ in range(2))
    written.run(write)
    replaced.run(replace)
    assert torch.equal(written.latents()[0], replaced.latents()[0])
    for wrong in ((), (torch.zeros(3, 64),), ([1.0],), None):

        def spoil(step: Step, wrong: Any = wrong) -> None:
            step.latents = wrong

        with pytest.raises(ValueError, match=r"on_step must leave tensors of shapes \[\(16, 64\)\] in step.latents, got \["):
            DenoisingRun(transformer, [job(transformer, 0)]).run(spoil)


def test_estimate_at_the_last_step_is_the_result() -> None:
    transformer = small_transformer()
    estimates: list[torch.Tensor] = []
    denoiser = DenoisingRun(transformer, [job(transformer, 0)])
    denoiser.run(lambda step: estimates.append(step.estimated_clean(0)))
    assert torch.equal(estimates[-1], denoiser.latents()[0])
    assert not torch.allclose(estimates[0], denoiser.latents()[0], atol=1e-3)


def test_reference_numerics_round_every_operation() -> None:
    transformer = small_transformer(dtype=torch.bfloat16)
    denoiser = DenoisingRun(transformer, [job(transformer, 0)], reference_numerics=True)
    step = denoiser.step()
    assert step.latents[0].dtype == torch.bfloat16
    assert DenoisingRun(transformer, [job(transformer, 0)]).step().latents[0].dtype == torch.float32


def test_jobs_that_do_not_fit_are_refused() -> None:
    transformer = small_transformer()
    entry = job(transformer, 0)
    with pytest.raises(ValueError, match="at least one image"):
        DenoisingRun(transformer, [])
    with pytest.raises(ValueError, match=r"same number of steps, got \[2, 3\]"):
        DenoisingRun(transformer, [entry, ImageJob(entry.sequence, entry.latent, (1.0, 0.5, 0.0))])
    with pytest.raises(ValueError, match="modulation for 3 steps, expected 1"):
        DenoisingRun(transformer, [ImageJob(entry.sequence, entry.latent, (1.0, 0.0))])
    with pytest.raises(ValueError, match="latent must be 8x8"):
        DenoisingRun(transformer, [ImageJob(entry.sequence, draw_noise(64, 32, 1), SIGMAS)])
    with pytest.raises(ValueError, match="negative sequence has grid"):
        DenoisingRun(transformer, [ImageJob(entry.sequence, entry.latent, SIGMAS, job(transformer, 2).sequence)])


def test_a_backend_that_cannot_take_unequal_lengths_is_refused_before_the_first_step() -> None:
    transformer = small_transformer()
    transformer.attention_backend = "dense_batched"
    denoiser = DenoisingRun(transformer, [job(transformer, 0), job(transformer, 1)])
    with pytest.raises(BackendUnavailable, match="'dense_batched' cannot run"):
        transformer.attention_backends(denoiser.batch)
