"""What a result says of how its images came about, on the embedded model: seeds, parameters, steps, warnings."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import uso_engine
from uso_engine import ResearchOptions, USOEngine
from uso_engine.errors import NumericsError
from uso_engine.sampling.step import Step
from uso_engine.sampling.watched_steps import WatchedSteps

OWN_FILE = Path(uso_engine.__file__).parent / "embedded/uso-tiny/dit_lora.safetensors"
OWN_LORA = {
    "path": "embedded:uso-tiny/dit_lora.safetensors",
    "weight": 1.0,
    "sha256": hashlib.sha256(
        (Path(uso_engine.__file__).parent / "embedded/uso-tiny/dit_lora.safetensors").read_bytes()
    ).hexdigest(),
}
SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 2}


def test_every_legal_seed_is_a_picture_of_its_own(engine: USOEngine) -> None:
    """Also beyond 32 bits, and every seed that is reported gives that image alone: after the last one comes 1."""

    def pictures(seed: int, count: int = 1) -> tuple[tuple[int, ...], list[bytes]]:
        result = engine.generate(prompt="a house", seed=seed, num_images=count, **SMALL)
        return result.seeds, [image.tobytes() for image in result.images]

    assert pictures(5)[1] != pictures(5 + 2**32)[1]
    seeds, images = pictures(2**53 - 1, 3)
    assert seeds == (2**53 - 1, 1, 2)
    assert images == [pictures(seed)[1][0] for seed in seeds]
    assert len(set(images)) == 3


def test_posterior_seeds_are_not_cut_to_32_bits(engine: USOEngine, content: Image.Image) -> None:
    first, second = (
        engine.generate(prompt="x", images=[content], seed=2, research=ResearchOptions(posterior_seed=seed), **SMALL)
        for seed in (9, 9 + 2**32)
    )
    assert first.images[0].tobytes() != second.images[0].tobytes()


def test_parameters_are_plain_json_and_say_what_ran(engine: USOEngine, content: Image.Image) -> None:
    found = engine.generate(prompt="x", images=[content, content], seed=3, **SMALL).parameters
    assert json.loads(json.dumps(found)) == found
    # The engine was loaded with a dtype in place of the configuration's tier.
    expected = {"config": "uso-tiny", "tier": "float32", "kernels": "reference", "device": "cpu", "steps_taken": 2, "seed": 3}
    assert {name: found[name] for name in expected} == expected
    assert found["loras"] == [OWN_LORA]
    assert found["attention"] == list(engine.generate(prompt="x", seed=3, **SMALL).attention)
    assert found["settings"]["safety"] == {"folder": "embedded:uso-tiny/safety"}  # type: ignore[index]
    assert "sigmas" not in found and "latents" not in found and "negative_prompt" not in found


def test_whatever_changes_the_picture_changes_the_parameters(engine: USOEngine, content: Image.Image, tmp_path: Path) -> None:
    engine.encode_prompt("a star").save(tmp_path / "prompt.safetensors")
    engine.encode_style(content).save(tmp_path / "style.safetensors")
    options = [
        ResearchOptions(sigmas=(1.0, 0.4, 0.0)),
        ResearchOptions(sigmas=(1.0, 0.3, 0.0)),
        ResearchOptions(latents=torch.zeros(1, 16, 8, 8)),
        ResearchOptions(latents=torch.ones(1, 16, 8, 8)),
        ResearchOptions(prompt_embedding=tmp_path / "prompt.safetensors"),
        ResearchOptions(style_tokens=(tmp_path / "style.safetensors",)),
        ResearchOptions(content_images=(content,)),
        ResearchOptions(style_images=(content,)),
        ResearchOptions(position_offset="h"),
        # What a family does by itself is another matter than what was asked for.
        ResearchOptions(position_offset="d"),
        ResearchOptions(posterior_seed=5),
        ResearchOptions(reference_numerics=True),
    ]
    fields: list[dict[str, Any]] = [
        {},
        {"images": [content.rotate(90)]},
        {"images": [None, content]},
        {"negative_prompt": "blue"},
        {"style_scale": 0.5},
        {"content_long_side": 64},
        {"enable_safety_checker": False},
    ]
    base: dict[str, Any] = {"prompt": "x", "seed": 3, "images": [content], **SMALL}
    records = [engine.generate(**(base | change)).parameters for change in fields]
    records += [engine.generate(**base, research=entry).parameters for entry in options]
    assert len({json.dumps(record, sort_keys=True) for record in records}) == len(fields) + len(options)
    assert records[len(fields)]["sigmas"] == [1.0, 0.4, 0.0]
    assert records[len(fields)]["num_inference_steps"] == 2


def test_a_picture_that_is_not_a_number_names_its_stage_and_tier(engine: USOEngine) -> None:
    weight = engine.pipeline.transformer.final_layer.linear.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(NumericsError, match=r"so the denoising steps made them, in tier float32: try tier bf16"):
            engine.generate(prompt="x", seed=3, **SMALL)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_loras_that_are_set_are_named(tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.proj"
    path = tmp_path / "turbo.safetensors"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 192), f"{name}.lora_B.weight": torch.zeros(192, 2)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    with USOEngine.from_config("uso-tiny", device="cpu") as engine:

        def loras() -> object:
            return engine.generate(prompt="x", seed=3, **SMALL).parameters["loras"]

        engine.set_loras([(path, 0.8)])
        assert loras() == [OWN_LORA, {"path": "turbo.safetensors", "weight": 0.8, "sha256": sha256}]
        engine.set_loras([(path, 0.5)], keep_configured=False)
        assert loras() == [{"path": "turbo.safetensors", "weight": 0.5, "sha256": sha256}]
        with pytest.raises(ValueError, match="finite"):
            engine.set_loras([(path, float("nan"))])
        assert loras() == [{"path": "turbo.safetensors", "weight": 0.5, "sha256": sha256}]
        engine.set_loras([])
        assert loras() == [OWN_LORA]


def test_a_stopped_run_records_the_steps_it_took(engine: USOEngine) -> None:
    result = engine.generate(prompt="x", seed=3, **(SMALL | {"num_inference_steps": 20}), on_step=Step.stop)
    assert (result.parameters["num_inference_steps"], result.parameters["steps_taken"]) == (20, 1)


def test_latents_that_on_step_changes_are_recorded(engine: USOEngine) -> None:
    def nothing(step: Step) -> None:
        step.unpacked(0).zero_()

    def scale(step: Step) -> None:
        if step.index == 0:
            step.latents[0].mul_(0.9)

    def changed(on_step: Callable[[Step], None]) -> object:
        return engine.generate(prompt="x", seed=3, on_step=on_step, **SMALL).parameters.get("latents_changed_by_on_step", False)

    assert (changed(nothing), changed(scale)) == (False, True)
    assert not WatchedSteps(nothing).changed


def test_a_cut_prompt_is_warned_of_once_for_each_encoder(engine: USOEngine, caplog: pytest.LogCaptureFixture) -> None:
    """In the result and, marked, in the log: also from the cache, and for the negative prompt."""
    long = "a small house by the sea " * 20
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "uso_engine"):
            result = engine.generate(prompt=long, negative_prompt=long, seed=1, **SMALL)
        assert [warning.split(":")[0].rstrip(" 0123456789") for warning in result.warnings] == [
            "T5 takes 20 tokens, the prompt has",
            "CLIP takes 77 tokens, the prompt has",
            "T5 takes 20 tokens, the negative prompt has",
            "CLIP takes 77 tokens, the negative prompt has",
        ]
        assert [record.getMessage() for record in caplog.records] == list(result.warnings)
        assert all(getattr(record, "in_result", False) for record in caplog.records)
    unused = engine.generate(prompt="x", negative_prompt=long, true_cfg_scale=1.0, seed=1, **SMALL)
    assert unused.warnings == ()


def test_letters_that_t5_does_not_know_are_named(engine: USOEngine) -> None:
    result = engine.generate(prompt="a 猫 on a 猫", seed=1, **SMALL)
    assert result.warnings == (
        "T5 has no token for '猫' in the prompt and reads 'unknown' in its place; write it in other words",
    )
    assert engine.generate(prompt="a cat", seed=1, **SMALL).warnings == ()


def test_the_response_follows_the_request(engine: USOEngine) -> None:
    result = engine.generate(prompt="x", seed=1, sync_mode=True, output_format="jpeg", **SMALL)
    assert result.to_response().images[0].url.startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="URLs need a store"):
        result.to_response(sync_mode=False)
    with pytest.raises(ValueError, match="URLs need a store"):
        engine.generate(prompt="x", seed=1, **SMALL).to_response()
