"""Calls as the examples of diffusers make them: generators, output types, callbacks, and what has no meaning here."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from uso_engine import Step, USOEngine
from uso_engine.api.fields import LARGEST_SEED, MAX_SEED, image_seeds
from uso_engine.api.request import GenerationRequest, request_model
from uso_engine.errors import SafetyError
from uso_engine.sampling.latents import pack_latent

SIZE: dict[str, Any] = {"width": 64, "height": 80}
CALL: dict[str, Any] = {**SIZE, "num_inference_steps": 2}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def test_the_model_cards_call(engine: USOEngine) -> None:
    image = engine(
        "A cat holding a sign that says hello world",
        **SIZE,
        guidance_scale=3.5,
        num_inference_steps=2,
        max_sequence_length=512,
        generator=_generator(0),
    ).images[0]
    assert image.size == (64, 80)
    fields = {"image_size": SIZE, "num_inference_steps": 2, "guidance_scale": 3.5, "seed": 0}
    expected = engine.generate("A cat holding a sign that says hello world", **fields)  # type: ignore[arg-type]
    assert image.tobytes() == expected.images[0].tobytes()


def test_a_generator_for_each_image(engine: USOEngine) -> None:
    seeds = [11, 3]
    made = engine("a house", num_images_per_prompt=2, generator=[_generator(seed) for seed in seeds], **CALL)
    alone = [engine("a house", seed=seed, **CALL).images[0].tobytes() for seed in seeds]
    assert [image.tobytes() for image in made.images] == alone
    both = engine(["a house", "a cup"], num_images_per_prompt=2, generator=[_generator(s) for s in (11, 3, 5, 6)], **CALL)
    assert [image.tobytes() for image in both.images[:2]] == alone
    assert [result.seed for result in both.results] == [11, 3, 5, 6]


def test_output_types_and_tuples(engine: USOEngine) -> None:
    call = {**CALL, "seed": 4, "num_images_per_prompt": 2}
    pictures = engine("a house", **call)
    pixels = np.stack([np.asarray(image) for image in pictures.images])
    array = engine("a house", output_type="np", **call)
    assert isinstance(array.images, np.ndarray) and array.images.dtype == np.float32
    assert array.images.shape == (2, 80, 64, 3)
    assert np.array_equal(np.round(array.images * 255), pixels)
    tensor = engine("a house", output_type="pt", **call).images
    assert isinstance(tensor, Tensor) and tensor.shape == (2, 3, 80, 64)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array.images)
    latents = engine("a house", output_type="latent", **call).images
    assert pictures.latents is not None
    assert isinstance(latents, Tensor) and torch.equal(latents, pack_latent(pictures.latents))
    (images,) = engine("a house", return_dict=False, **call)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in pictures.images]


def test_withheld_latents_are_not_given(engine: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.parts.safety is not None
    monkeypatch.setattr(type(engine.parts.safety), "screen", lambda self, images: (images, (True,) * len(images)))
    with pytest.raises(SafetyError, match="its latents are withheld"):
        engine("a house", output_type="latent", seed=4, **CALL)


def test_callbacks_see_a_pipeline_and_tensors(engine: USOEngine) -> None:
    seen: list[tuple[int, int, float, torch.Size]] = []

    def look(pipe: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not pipe.interrupt
        seen.append((pipe.num_timesteps, index, float(timestep), given["latents"].shape))
        return given

    call = {**CALL, "seed": 4, "num_images_per_prompt": 2}
    made = engine("a house", callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents"], **call)
    assert [entry[:2] for entry in seen] == [(2, 0), (2, 1)]
    assert seen[0][2] == pytest.approx(1000)
    assert all(shape == (2, 20, 64) for *_, shape in seen)
    plain = engine("a house", **call)
    assert [a.tobytes() for a in made.images] == [b.tobytes() for b in plain.images]


def _halved_tensor(given: dict[str, Tensor]) -> object:
    return {"latents": given["latents"] * 0.5}


def _halved_in_place(given: dict[str, Tensor]) -> object:
    given["latents"].mul_(0.5)
    return {}


def _halved_list(given: dict[str, Tensor]) -> object:
    return {"latents": [latent * 0.5 for latent in given["latents"]]}


@pytest.mark.parametrize("halve", [_halved_tensor, _halved_in_place, _halved_list])
def test_latents_that_callbacks_return_or_write_to_are_used(halve: Any, engine: USOEngine) -> None:
    def on_step(step: Step) -> None:
        for latent in step.latents:
            latent.mul_(0.5)

    expected = engine.generate("a cup", on_step=on_step, image_size=SIZE, num_inference_steps=2, seed=5, num_images=2)
    made = engine("a cup", callback_on_step_end=lambda p, i, t, k: halve(k), seed=5, num_images_per_prompt=2, **CALL)
    assert [a.tobytes() for a in made.images] == [b.tobytes() for b in expected.images]


def test_an_interrupted_run_ends_after_the_step(engine: USOEngine) -> None:
    indices: list[int] = []

    def interrupt(pipe: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        indices.append(index)
        pipe._interrupt = True
        return given

    for _ in range(2):  # the next run begins uninterrupted
        made = engine("a house", callback_on_step_end=interrupt, seed=4, **CALL)
    expected = engine.generate("a house", on_step=lambda step: step.stop(), image_size=SIZE, num_inference_steps=2, seed=4)
    assert indices == [0, 0]
    assert made.images[0].tobytes() == expected.images[0].tobytes()


def test_minus_one_draws_a_seed(engine: USOEngine) -> None:
    drawn = {engine("a", seed=-1, **CALL).seed for _ in range(3)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"output_type": "jpeg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent', got 'jpeg'"),
        ({"output_type": ["pil"]}, "output_type must be one of"),
        ({"return_dict": 1}, "return_dict must be True or False, got 1"),
        (
            {"max_sequence_length": 10},
            "max_sequence_length must be a whole number from 20, the length that this configuration pads",
        ),
        ({"max_sequence_length": 513}, "to 512, got 513"),
        ({"max_sequence_length": True}, "max_sequence_length must be a whole number"),
        ({"generator": [_generator(1)], "num_images_per_prompt": 2}, "one for each of the 2 images, got a list of 1"),
        ({"generator": [1, 2], "num_images_per_prompt": 2}, "generator must be a torch.Generator, got int"),
        ({"generator": _generator(1), "seed": 3}, "give generator or seed, not both"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "must be a list of latents, got"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of latents, got 'latents'"),
        ({"joint_attention_kwargs": {}}, "unknown arguments joint_attention_kwargs"),
        ({"seed": -2}, "seed must be a whole number from 0 to 18446744073709551615, got -2"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(arguments: dict[str, Any], says: str, engine: USOEngine) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        engine("a house", **arguments)


def test_seeds_of_python_and_of_http() -> None:
    hosted = request_model(wire=True)
    for seed in (0, MAX_SEED + 1, LARGEST_SEED):
        assert GenerationRequest(prompt="", seed=seed).seed == seed
        with pytest.raises(ValueError, match="seed must be a whole number from 1 to 9007199254740991"):
            hosted(prompt="", model="bytedance/uso", image_urls=[], seed=seed)
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 18446744073709551615"):
        GenerationRequest(prompt="", seed=LARGEST_SEED + 1)
    assert image_seeds(MAX_SEED, 2) == (MAX_SEED, 1)
    assert image_seeds(0, 3) == (0, 1, 2)
    assert image_seeds(LARGEST_SEED, 2) == (LARGEST_SEED, 0)
    assert image_seeds(MAX_SEED + 1, 2) == (MAX_SEED + 1, MAX_SEED + 2)
