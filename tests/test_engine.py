"""The engine as its users see it, on the embedded model."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from uso_engine import GenerationRequest, ResearchOptions, USOEngine, load_config
from uso_engine.config import EngineConfig
from uso_engine.errors import BackendError, CheckpointError, EngineClosedError, ImageError, MissingFileError, SafetyError
from uso_engine.loading.assembly import check_text_widths
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.step import Step

TEXT_TOKENS, STYLE_TOKENS = 20, 4  # of configs/uso-tiny.toml
SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 2}


def test_a_request_and_its_fields_are_the_same(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    fields: dict[str, Any] = {"prompt": "a red fish", "images": [content, style], "seed": 7, "num_inference_steps": 2}
    request = GenerationRequest(**fields)
    first, second = engine.generate(request), engine.generate(**fields)
    assert first.images[0].tobytes() == second.images[0].tobytes()
    # The request says no size, so it gets this engine's default, not the hosted API's.
    assert (first.width, first.height, first.images[0].size) == (128, 128, (128, 128))
    assert first.seeds == (7,)
    assert list(first.timings) == ["queue", "images", "encode", "denoise", "decode", "safety"]
    with pytest.raises(ValueError, match="a request and prompt"):
        engine.generate(request, prompt="another")


def test_num_images_does_not_change_an_image(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    fields: dict[str, Any] = {"prompt": "a house", "images": [content, style], **SMALL}
    four = engine.generate(num_images=4, seed=20, **fields)
    assert four.seeds == (20, 21, 22, 23)
    assert len({image.tobytes() for image in four.images}) == 4
    for seed, image in zip(four.seeds, four.images, strict=True):
        assert engine.generate(seed=seed, **fields).images[0].tobytes() == image.tobytes()
    assert torch.is_tensor(four.latents)


def test_every_input_changes_the_image(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    base: dict[str, Any] = {"prompt": "a cup", "images": [content, style], "seed": 3, "negative_prompt": "", **SMALL}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "a tree at night"},
        {"images": [style, style]},
        {"images": [content, content]},
        {"images": [content]},
        {"images": [None, style]},
        {"images": []},
        {"seed": 4},
        {"guidance_scale": 9.0},
        {"num_inference_steps": 3},
        {"style_scale": 0.5},
        {"negative_prompt": "blue"},
        {"negative_prompt": "blue", "true_cfg_scale": 4.0},
        {"content_long_side": 64},
    ]
    results = [engine.generate(**{**base, **change}).images[0].tobytes() for change in changes]
    assert len(set(results)) == len(changes)
    # A scale of 1 is the prompt alone.
    assert engine.generate(**{**base, "negative_prompt": "blue", "true_cfg_scale": 1.0}).images[0].tobytes() == results[0]


def test_keep_size_takes_the_content_images_shape(engine: USOEngine, content: Image.Image) -> None:
    result = engine.generate(prompt="", images=[content], keep_size=True, seed=1, num_inference_steps=1)
    # 96x64 at long side 128 is 128x85, cropped to 128x80; times 2.
    assert (result.width, result.height) == (256, 160)


def test_tokens_are_counted_over_steps_and_sequences(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    base: dict[str, Any] = {"prompt": "a cup", "images": [content, style], "seed": 3, **SMALL}
    params = engine.config.projector
    assert params is not None
    assert engine.config.t5 is not None
    tokens = engine.config.t5.max_length + 3 * params.style_tokens + 16 + (128 // 16) * (80 // 16)
    assert engine.generate(**base).tokens_used == 2 * tokens
    assert engine.generate(num_images=2, **base).tokens_used == 4 * tokens
    assert engine.generate(negative_prompt="x", **base).tokens_used == 4 * tokens


def test_caches_answer_the_second_time(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    before = engine.cache_statistics()
    for _ in range(2):
        engine.generate(prompt="a prompt nobody used before", images=[content, style], seed=3, **SMALL)
    after = engine.cache_statistics()
    assert after["prompt"].misses == before["prompt"].misses + 1
    assert after["prompt"].hits == before["prompt"].hits + 1
    assert after["style"].hits >= before["style"].hits + 1
    assert after["content"].hits >= before["content"].hits + 1


def test_on_step_sees_stops_and_previews(engine: USOEngine) -> None:
    seen: list[tuple[int, float]] = []
    previews: list[Image.Image] = []

    def stop_after_two(step: Step) -> None:
        seen.append((step.index, step.sigmas[0]))
        previews.append(engine.preview(step))
        if step.index == 1:
            step.stop()

    result = engine.generate(prompt="x", seed=1, num_inference_steps=5, on_step=stop_after_two)
    assert [index for index, _ in seen] == [0, 1]
    assert seen[0][1] == 1.0
    assert previews[0].size == (128, 128)
    assert result.tokens_used == 2 * (64 + TEXT_TOKENS)


def test_raising_from_on_step_cancels_and_frees_the_engine(engine: USOEngine) -> None:
    class Enough(Exception):
        pass

    def cancel(step: Step) -> None:
        raise Enough

    with pytest.raises(Enough):
        engine.generate(prompt="x", seed=1, on_step=cancel, **SMALL)
    assert engine.generate(prompt="x", seed=1, **SMALL).images


def test_latents_go_in_and_out(engine: USOEngine) -> None:
    full = engine.generate(prompt="x", seed=5, **SMALL)
    given = ResearchOptions(latents=draw_noise(64, 64, 5)[None])
    again = engine.generate(prompt="x", seed=999, research=given, **SMALL)
    assert full.latents is not None
    assert again.latents is not None
    assert torch.equal(full.latents, again.latents)
    custom = engine.generate(prompt="x", seed=5, research=ResearchOptions(sigmas=(1.0, 0.3, 0.1, 0.0)), **SMALL)
    assert custom.tokens_used == 3 * (16 + TEXT_TOKENS)
    with pytest.raises(ValueError, match=r"latents must have shape \[1, 16, 8, 8\], got \[1, 16, 8, 9\]"):
        engine.generate(prompt="x", research=ResearchOptions(latents=torch.zeros(1, 16, 8, 9)), **SMALL)
    with pytest.raises(ValueError, match="finite"):
        engine.generate(prompt="x", research=ResearchOptions(latents=torch.full((1, 16, 8, 8), float("nan"))), **SMALL)


def test_conditions_are_saved_loaded_and_passed_in(engine: USOEngine, style: Image.Image, tmp_path: Path) -> None:
    expected = engine.generate(prompt="a star", images=[None, style], seed=2, **SMALL)
    engine.encode_prompt("a star").save(tmp_path / "prompt.safetensors")
    engine.encode_style(style).save(tmp_path / "style.safetensors")
    research = ResearchOptions(prompt_embedding=tmp_path / "prompt.safetensors", style_tokens=(tmp_path / "style.safetensors",))
    assert (
        engine.generate(seed=2, research=research, prompt="not read", **SMALL).images[0].tobytes()
        == expected.images[0].tobytes()
    )


def test_more_references_than_the_schema_takes(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    research = ResearchOptions(content_images=(style, content), style_images=(content, style))
    result = engine.generate(prompt="x", images=[content, style], seed=2, research=research, **SMALL)
    style_tokens = 3 * 3 * STYLE_TOKENS
    assert result.tokens_used == 2 * (16 + TEXT_TOKENS + style_tokens + 40 + 64 + 40)


def test_posterior_sample_differs_from_its_mean(engine: USOEngine, content: Image.Image) -> None:
    mean = engine.generate(prompt="x", images=[content], seed=2, **SMALL).images[0].tobytes()
    first, second = (
        engine.generate(prompt="x", images=[content], seed=2, research=ResearchOptions(posterior_seed=9), **SMALL)
        .images[0]
        .tobytes()
        for _ in range(2)
    )
    assert first == second != mean


def test_diffusers_style_call(engine: USOEngine, content: Image.Image, style: Image.Image) -> None:
    ours = engine.generate(prompt="a cup", images=[content, style], seed=11, num_images=2, **SMALL)
    theirs = engine(
        "a cup", image=content, style_image=[style], width=64, height=64, num_inference_steps=2, num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    assert [image.tobytes() for image in theirs.images] == [image.tobytes() for image in ours.images]
    with pytest.raises(ValueError, match="unknown arguments ip_adapter_image, strength"):
        engine("a cup", strength=0.5, ip_adapter_image=style)
    with pytest.raises(ValueError, match="width and height come together"):
        engine("a cup", width=64)
    with pytest.raises(ValueError, match=r"torch\.Generator, got int"):
        engine("a cup", generator=3)


def test_long_prompts_are_cut_with_a_warning(engine: USOEngine) -> None:
    result = engine.generate(prompt="a small house " * 60, seed=1, **SMALL)
    assert any("T5" in warning and "cut after" in warning for warning in result.warnings)


def test_threads_wait_their_turn(engine: USOEngine) -> None:
    expected = {seed: engine.generate(prompt="x", seed=seed, **SMALL).images[0].tobytes() for seed in (1, 2, 3)}
    got: dict[int, bytes] = {}

    def work(seed: int) -> None:
        got[seed] = engine.generate(prompt="x", seed=seed, **SMALL).images[0].tobytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_bad_images_name_their_place(engine: USOEngine, content: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    with pytest.raises(ImageError, match=r"image_urls\[1\]"):
        engine.generate(prompt="x", images=[content, tmp_path / "text.png"], **SMALL)
    with pytest.raises(MissingFileError, match=r"nothing\.png"):
        engine.generate(prompt="x", images=[tmp_path / "nothing.png"], **SMALL)
    with pytest.raises(ImageError, match="each side must keep at least 16 pixels"):
        engine.generate(prompt="x", images=[Image.new("RGB", (2000, 20))], **SMALL)


def test_limits_are_the_configurations(engine: USOEngine) -> None:
    with pytest.raises(ValueError, match=r"image_size\.width must be from 64 to 1024, got 2048"):
        engine.generate(prompt="x", image_size={"width": 2048, "height": 64})


def test_closed_engine_says_so() -> None:
    engine = USOEngine.from_config("uso-tiny", device="cpu")
    engine.warmup()
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError, match="uso-tiny was closed"):
        engine.generate(prompt="x", seed=1, **SMALL)
    with pytest.raises(EngineClosedError, match=r"uso-tiny was closed; make a new one with USOEngine\.from_config"), engine:
        pytest.fail("the statement of a closed engine has begun")


def changed(**sections: object) -> EngineConfig:
    return load_config("uso-tiny").model_copy(update=sections)


def test_missing_files_are_named_before_anything_runs() -> None:
    config = load_config("uso-tiny")
    broken = config.model_copy(update={"transformer": config.transformer.model_copy(update={"checkpoint": "nowhere/at:all"})})
    with pytest.raises(MissingFileError, match="uso-engine download"):
        USOEngine.from_config(broken, device="cpu")


def test_what_is_not_there_is_an_error() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no CUDA GPU"):
            USOEngine.from_config("uso-tiny", device="cuda")
    with pytest.raises(BackendError, match="'tpu' is not a device"):
        USOEngine.from_config("uso-tiny", device="tpu")
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.bfloat16, got torch\.float16"):
        USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float16)
    silent = USOEngine.from_config(changed(t5=None, clip=None, safety=None), device="cpu")
    with pytest.raises(SafetyError, match="names no"):
        silent.generate(prompt="x", **SMALL)
    with pytest.raises(BackendError, match="no text encoders"):
        silent.generate(prompt="x", enable_safety_checker=False, **SMALL)


def test_text_encoders_of_another_width_are_refused_at_loading() -> None:
    config = load_config("uso-tiny")
    assert config.clip is not None
    params = replace(config.transformer.params, vec_in_dim=48)
    other = config.model_copy(update={"transformer": config.transformer.model_copy(update={"params": params})})
    with USOEngine.from_config("uso-tiny", device="cpu") as engine, pytest.raises(CheckpointError, match="CLIP gives width"):
        check_text_widths(engine.pipeline.text, other)


def test_attention_backends_are_chosen_and_reported() -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", attention="dense_batched") as batched:
        assert batched.generate(prompt="x", seed=1, num_images=2, **SMALL).attention == ("dense_batched",)
    with pytest.raises(BackendError, match="these can: auto, dense"):
        USOEngine.from_config("uso-tiny", device="cpu", attention="varlen")


def test_an_operator_may_forbid_switching_the_checker_off() -> None:
    config = load_config("uso-tiny")
    assert config.safety is not None
    strict = changed(safety=config.safety.model_copy(update={"forbid_disabling": True}))
    with (
        USOEngine.from_config(strict, device="cpu") as engine,
        pytest.raises(ValueError, match="enable_safety_checker must be true"),
    ):
        engine.generate(prompt="x", enable_safety_checker=False, **SMALL)
