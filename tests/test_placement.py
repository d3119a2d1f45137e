"""Memory budgets carried out: the same pictures with everything streamed, refusals before anything runs, other LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from streamed_engines import everything_streamed, plain_and_streamed

from uso_engine import ResearchOptions, USOEngine, load_config
from uso_engine.errors import MemoryBudgetError
from uso_engine.generation import Generation
from uso_engine.offload.budget import find_budget
from uso_engine.offload.phases import GIB, MODULATION, Choice, moved_bytes_of
from uso_engine.offload.placement import Placement

REQUEST: dict[str, Any] = {"prompt": "the object in the hills", "num_inference_steps": 3, "seed": 5}
CPU = torch.device("cpu")


def placement_of(engine: USOEngine) -> Placement:
    placement = engine.pipeline.placement
    assert placement is not None
    return placement


@pytest.fixture(scope="module")
def pictures(content: Image.Image, style: Image.Image) -> dict[str, Any]:
    return {"images": [content, style]}


@pytest.fixture(scope="module", params=["float32", "bf16", "int8"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[USOEngine, USOEngine]]:
    """The same configuration without a plan and with everything streamed."""
    with plain_and_streamed(request.param, "cpu") as both:
        yield both


def test_pictures_are_the_same_however_the_weights_travel(
    engines: tuple[USOEngine, USOEngine], pictures: dict[str, Any]
) -> None:
    plain, planned = engines
    assert plain.memory_plan is None
    plan = planned.memory_plan
    assert plan is not None
    assert {"T5", "CLIP", "SigLIP and projector", "autoencoder", "safety classifier", MODULATION} == set(plan.streamed)
    placement = placement_of(planned)
    moved = []
    for steps in (3, 3, 5):
        fields = {**REQUEST, **pictures, "num_inference_steps": steps}
        before = placement.moved_bytes
        expected, result = plain.generate(**fields), planned.generate(**fields)
        assert result.images[0].tobytes() == expected.images[0].tobytes()
        moved.append(placement.moved_bytes - before)
    # The plan counts 28 steps and nothing cached. A stream brings its first layer once more than needed; tensors are padded.
    per_step = sum(placement.sizes.transformer.double_blocks[i] for i in plan.streamed_double_blocks)
    per_step += sum(placement.sizes.transformer.single_blocks[i] for i in plan.streamed_single_blocks)
    uncached = plan.moved_bytes - 25 * per_step
    assert uncached <= moved[0] <= 1.1 * (uncached + per_step)
    # The second time prompt, style and content come from the caches, the third time there are two steps more.
    assert moved[1] < moved[0] - 0.9 * plan.streamed["T5"]
    assert 2 * per_step <= moved[2] - moved[1] <= 2.2 * per_step
    for stream in placement._streams.values():
        assert stream.device_bytes == 0


def test_other_loras_are_streamed_from_then_on(engines: tuple[USOEngine, USOEngine], pictures: dict[str, Any]) -> None:
    before = None
    for keep_configured in (False, True):
        images = []
        for engine in engines:
            engine.set_loras([], keep_configured=keep_configured)
            images.append(engine.generate(**REQUEST, **pictures).images[0].tobytes())
        assert images[0] == images[1]
        assert images[0] != before
        before = images[0]


def test_conditions_wait_on_the_host_while_a_plan_is_in_force(engines: tuple[USOEngine, USOEngine]) -> None:
    embedding = engines[1].encode_prompt("a fish")
    assert embedding.tokens.device == CPU
    assert torch.equal(embedding.tokens, engines[0].encode_prompt("a fish").tokens)


def test_a_large_budget_streams_nothing(pictures: dict[str, Any]) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=8) as engine:
        plan = engine.memory_plan
        assert plan is not None and not plan.streamed and not plan.streamed_single_blocks
        engine.generate(**REQUEST, **pictures)
        assert placement_of(engine).moved_bytes == 0


def test_a_budget_too_small_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    # There are no weights at all: what is said first is that they would not fit.
    config = load_config("uso-flux-dev").model_copy(update={"base_folder": tmp_path})
    with pytest.raises(MemoryBudgetError, match=r"uso-flux-dev does not fit into 1\.5 GiB: .*denoising needs"):
        USOEngine.from_config(config, device="cpu", memory_budget_gib=1.5)
    for wrong in (0, -1, float("nan"), float("inf"), 1e300, "3", True):
        with pytest.raises(ValueError, match=r"memory_budget_gib must be a number of GiB from 0\.001 to 1e\+06, got"):
            USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=wrong)  # type: ignore[arg-type]
    # The transformer alone would fit; with its encoders measured it does not.
    with pytest.raises(MemoryBudgetError, match=r"uso-tiny does not fit"):
        USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=1.004)


def test_a_request_over_the_budget_is_refused_before_it_runs(pictures: dict[str, Any]) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=1.05) as engine:
        large = {**REQUEST, **pictures, "image_size": {"width": 512, "height": 512}}
        with pytest.raises(MemoryBudgetError, match=r"1 x 512x512 with 1 content and 1 style images needs .*smaller size"):
            engine.generate(**large)
        with pytest.raises(MemoryBudgetError, match=r"\(content\), .* ask for a smaller content_long_side"):
            engine.generate(**REQUEST, **pictures, content_long_side=1024)
        assert engine.cache_statistics()["prompt"].misses == 0
        placement = placement_of(engine)
        # With room to decode it whole.
        plan = replace(placement.plan, budget_bytes=4 * GIB)
        one, four = (
            plan.peak_for(placement.sizes, replace(placement.usual, width=256, height=256, images=count)).peak_bytes
            for count in (1, 4)
        )
    assert one < four
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=(one + four) / 2 / GIB) as engine:
        many = {**REQUEST, **pictures, "image_size": {"width": 256, "height": 256}}
        with pytest.raises(MemoryBudgetError, match=r"4 x 256x256 .* \(decoding\), .*; [123] at a time would fit"):
            engine.generate(**many, num_images=4)
        assert len(engine.generate(**many).images) == 1


def test_larger_images_are_decoded_in_strips_and_the_same_alone_and_among_others() -> None:
    latents = torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(6))
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=1.121) as engine:
        pipeline, placement = engine.pipeline, placement_of(engine)
        assert placement.plan.decoding == "whole"
        # What one image leaves between layers on the device has to go to the host where two are made.
        assert [pipeline.decoding(given) for given in (latents[:1], latents)] == ["strips", "host strips"]
        assert placement.moved_bytes == 0
        alone, together = pipeline.decode(latents[:1]), pipeline.decode(latents)
        whole = pipeline.autoencoder.decode(latents)
        work = replace(placement.usual, width=512, height=512, images=2)
        moved = moved_bytes_of(Choice(frozenset(), decoding="host strips"), placement.sizes, work)
        assert 0 < placement.moved_bytes <= moved
        # A small picture is not cut, whatever a plan says.
        assert pipeline.decoding(latents[:, :, :16, :16]) == "whole"
    assert torch.equal(alone, together[:1])
    assert 0 < float((together - whole).abs().max()) < 5e-6 * float(whole.abs().max())


def test_the_configuration_may_set_the_budget() -> None:
    config = load_config("uso-tiny").model_copy(update={"memory_budget_gib": 2.0})
    with USOEngine.from_config(config, device="cpu") as engine:
        assert placement_of(engine).budget.size_bytes == 2 * GIB
    with USOEngine.from_config(config, device="cpu", memory_budget_gib=3) as engine:
        assert placement_of(engine).budget.size_bytes == 3 * GIB


def test_by_default_the_budget_is_what_the_gpu_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    config, free = load_config("uso-flux-dev"), 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 200 * GIB))
    assert find_budget(config, "bf16", CPU, None) is None
    found = {}
    # Twice the size in float32: nothing may be taken for bf16's.
    free = 48 * GIB
    assert find_budget(config, "float32", torch.device("cuda"), None) is not None
    assert find_budget(config, "bf16", torch.device("cuda"), None) is None
    for gib in (16, 24, 80):
        free = gib * GIB
        found[gib] = find_budget(config, "bf16", torch.device("cuda"), None)
    assert found[80] is None
    for gib in (16, 24):
        budget = found[gib]
        assert budget is not None and (budget.size_bytes, budget.binding) == (gib * GIB, False)


def test_a_budget_beyond_what_the_gpu_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    cuda, config = torch.device("cuda"), load_config("uso-flux-dev-fp8")
    with pytest.raises(MemoryBudgetError, match=r"memory_budget_gib is 24, but cuda has 15\.00 GiB free"):
        find_budget(config, "fp8", cuda, 24)
    # The context is part of a budget and taken already.
    assert find_budget(config, "fp8", cuda, 16) is not None


def test_a_closed_engine_brings_nothing_any_more() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uso_engine.offload.placement.plan_memory", everything_streamed)
        engine = USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=4)
    module, encoder = engine.pipeline.transformer, engine.pipeline.text.t5
    assert module.double_blocks[0]._forward_pre_hooks and encoder.encoder.block[0]._forward_pre_hooks
    engine.close()
    assert not module.double_blocks[0]._forward_pre_hooks and not encoder.encoder.block[0]._forward_pre_hooks


def test_plans_count_what_research_options_bring(pictures: dict[str, Any], tmp_path: Path) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", memory_budget_gib=4) as engine:
        style = engine.encode_style(pictures["images"][1])
        request = engine.request_type(prompt="x", num_images=2, negative_prompt="y")
        long = replace(style, tokens=style.tokens.repeat(10, 1))
        long.save(tmp_path / "style.safetensors")
        embedding = engine.encode_prompt("x")
        wide = replace(embedding, tokens=embedding.tokens.repeat(3, 1))
        wide.save(tmp_path / "prompt.safetensors")
        options = ResearchOptions(
            sigmas=tuple(1 - i / 100 for i in range(101)),
            style_tokens=(long, tmp_path / "style.safetensors"),
            prompt_embedding=tmp_path / "prompt.safetensors",
        )
        generation = Generation(engine.parts, request.with_seed(), options)
        generation.open()
        work = generation.size()
    assert (work.steps, work.images, work.negative, work.sequences) == (100, 2, True, 4)
    assert (work.contents, work.styles) == (0, 0)
    assert work.text_tokens == 3 * 20 + 2 * len(long.tokens)


def test_plans_know_the_strips_of_the_configuration() -> None:
    loaded = load_config("uso-tiny")
    assert loaded.autoencoder is not None
    autoencoder = loaded.autoencoder.model_copy(update={"tile_side": 64})
    peaks = []
    for config in (loaded, loaded.model_copy(update={"autoencoder": autoencoder})):
        with USOEngine.from_config(config, device="cpu", memory_budget_gib=4) as engine:
            placement = placement_of(engine)
            large = replace(placement.usual, width=512, height=512, content_side=512)
            phases = placement.plan.peak_for(placement.sizes, large)
            encoding = placement.plan.peak_for(placement.sizes, replace(large, width=64, height=64))
            assert (phases.name, encoding.name) == ("decoding", "content")
            peaks.append((phases.peak_bytes, encoding.peak_bytes))
            assert engine.pipeline.decoding(torch.zeros(1, 16, 64, 64)) == ("strips" if peaks[1:] else "whole")
    for whole, cut in zip(*peaks, strict=True):
        assert cut - GIB < 0.6 * (whole - GIB)


def test_quantised_text_encoders_need_scratch() -> None:
    loaded = load_config("uso-tiny")
    precision = loaded.precision.model_copy(update={"text_encoder": "int8"})
    working = []
    for config in (loaded, loaded.model_copy(update={"precision": precision})):
        with USOEngine.from_config(config, device="cpu", memory_budget_gib=4) as engine:
            working.append(placement_of(engine).sizes.components["T5"].working_bytes)
    assert working[1] > working[0]
