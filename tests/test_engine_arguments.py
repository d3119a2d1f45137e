"""What callers hand to the engine's methods: taken in its natural forms, refused by name in others."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import uso_engine.engine
from uso_engine import ResearchOptions, Step, USOEngine, load_config
from uso_engine.conditioning.style import StyleTokens
from uso_engine.conditioning.text import TextEmbedding
from uso_engine.config import parse_config
from uso_engine.errors import ConfigError

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 48))


def test_a_prompt_alone_is_a_request(engine: USOEngine) -> None:
    fields = {"images": PICTURE, "seed": 3, **SMALL}
    alone, named = engine.generate("a house", **fields), engine.generate(prompt="a house", **fields)
    assert alone.images[0].tobytes() == named.images[0].tobytes()
    assert alone.prompt == "a house"


Wrong = tuple[Callable[[Any], object], str]
WRONG_CALLS: list[Wrong] = [
    (
        lambda e: e.generate({"prompt": "a"}),
        "expected a GenerationRequest, a prompt, or fields as keywords, got an object with",
    ),
    (lambda e: e.generate({"prompt": "a"}), "a mapping of fields goes in as keywords: generate(**fields)"),
    (
        lambda e: e.generate(["a", "b"]),
        "got a list of 2; several prompts go to the engine itself: engine([…])",
    ),
    (lambda e: e.generate(7), "expected a GenerationRequest, a prompt, or fields as keywords, got 7"),
    (lambda e: e.generate("a", prompt="b"), "the prompt is given twice"),
    (lambda e: e.generate(), "prompt is required"),
    (lambda e: e.generate("a", on_step=3), "on_step must be a function that takes a Step, got 3"),
    (lambda e: e.generate("a", research={"sigmas": [1, 0]}), "research must be ResearchOptions, got an object with sigmas"),
    (lambda e: e.generate("a", progress="yes"), "progress must be True or False, got 'yes'"),
    (lambda e: e.generate("a", width=64), "'width' is not a field of a request; did you mean 'image_size'?"),
    (lambda e: e.generate("a", steps=4), "'steps' is not a field of a request; did you mean 'num_inference_steps'?"),
    (lambda e: e.generate("a", negative_prompt="x" * 4001), "negative_prompt must have at most 4000 characters, got 4001"),
    (lambda e: e.encode_prompt(None), "prompt must be a string, got null"),
    (lambda e: e.encode_prompt("x" * 4001), "prompt must have at most 4000 characters, got 4001"),
    (lambda e: e.encode_style(7), "image must be a path, URL, data URI, bytes, binary file, PIL image, numpy array or"),
    (
        lambda e: e.encode_content([PICTURE]),
        "image must be a path, URL, data URI, bytes, binary file, PIL image, numpy array or",
    ),
    (lambda e: e.preview("step"), "step must be what on_step was given, got 'step'"),
    (lambda e: e.set_loras([], keep_configured="no"), "keep_configured must be True or False, got 'no'"),
    (lambda e: e(7), "prompt must be a string, got 7"),
    (lambda e: e([]), "prompt must be a string or a list of at least one, got an empty list"),
    (lambda e: e("a", progress=torch.zeros(3)), "progress must be True or False, got Tensor"),
    (lambda e: e(["a", 7]), "prompt must be a string, got 7"),
    (lambda e: e("a", steps=4), "unknown arguments steps; for steps did you mean 'num_inference_steps'?; known: prompt, "),
    (lambda e: e("a", callback_on_step_end=3), "callback_on_step_end must be callable, got int"),
    (lambda e: e(["a"], generator=[1, 2]), "generator must be one, or one for each of the 1 prompts, got a list of 2"),
]


@pytest.mark.parametrize(("call", "says"), WRONG_CALLS)
def test_wrong_arguments_are_named(engine: USOEngine, call: Callable[[USOEngine], object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        call(engine)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": 7}, "config must be a configuration's name, the path of a TOML file, or an EngineConfig, got 7"),
        ({"device": 0}, "device must be 'cpu', 'cuda', 'cuda:N' or a torch.device, got 0"),
        ({"dtype": "bfloat16"}, "dtype must be torch.float32 or torch.bfloat16, got 'bfloat16'"),
        ({"dtype": [torch.float32]}, "dtype must be torch.float32 or torch.bfloat16, got a list of 1"),
        ({"attention": None}, "attention must be an attention backend's name or 'auto', got null"),
        ({"memory_budget_gib": "8"}, "memory_budget_gib must be a number of GiB"),
        ({"memory_budget_gib": float("nan")}, "memory_budget_gib must be a number of GiB"),
        ({"image_limits": 8}, "image_limits must be ImageLimits, got 8"),
        ({"progress": True}, "progress must be a function that takes a part, bytes done and bytes in all, got true"),
    ],
)
def test_loading_names_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        USOEngine.from_config(**{"config": "uso-tiny", "device": "cpu", **arguments})


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"defaults": {"width": 32}}, r"image_size\.width must be from 64 to 1024, got 32"),
        ({"content": {"long_side": 32}}, "content_long_side must be a whole number from 64 to 1024, got 32"),
    ],
    ids=["size", "content"],
)
def test_defaults_outside_the_limits_are_refused_before_loading(
    section: dict[str, dict[str, int]], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(uso_engine.engine, "load_parts", load)
    given = load_config("uso-tiny").model_dump()
    config = parse_config({**given, **{name: given[name] | changed for name, changed in section.items()}})
    with pytest.raises(ConfigError, match=rf"uso-tiny: \[defaults\] and \[content\] do not fit \[limits\]: .*{says}"):
        USOEngine.from_config(config, device="cpu")


def test_a_device_may_be_torchs_own() -> None:
    with USOEngine.from_config("uso-tiny", device=torch.device("cpu")) as loaded:
        assert loaded.device == torch.device("cpu")


NO_TENSOR = StyleTokens(np.zeros((4, 8)), "", "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"latents": np.zeros((1, 16, 8, 8))}, "research.latents must be a torch.Tensor [n, 16, h / 8, w / 8]"),
        ({"latents": torch.zeros(1, 16, 8, 8, dtype=torch.int32)}, "research.latents must be a dense tensor of floating-point"),
        ({"latents": torch.zeros(1, 16, 8, 8, device="meta")}, "research.latents must be a dense tensor of floating-point"),
        ({"sigmas": 3}, "research.sigmas must be a list of numbers, got 3"),
        ({"sigmas": torch.zeros(2, device="meta")}, "research.sigmas must be a list of numbers, got Tensor"),
        ({"sigmas": torch.zeros(2).to_sparse()}, "research.sigmas must be a list of numbers, got Tensor"),
        ({"sigmas": "1.0"}, "research.sigmas must be a list of numbers, got '1.0'"),
        ({"sigmas": [1.0, "0"]}, "research.sigmas must be a list of numbers, got a list of 2"),
        ({"sigmas": [10**400, 0]}, "research.sigmas must be a list of numbers, got one that is too large"),
        ({"strength": 0}, "research.strength must be a number over 0 and at most 1, got 0"),
        ({"strength": 1.5}, "research.strength must be a number over 0 and at most 1, got 1.5"),
        ({"strength": float("nan")}, "research.strength must be a number over 0 and at most 1, got NaN"),
        ({"strength": True}, "research.strength must be a number over 0 and at most 1, got true"),
        ({"strength": 0.5, "latents": torch.zeros(1, 16, 8, 8)}, "research.latents and research.strength both say what to"),
        (
            {"prompt_embedding": torch.zeros(4, 8)},
            "research.prompt_embedding must be a TextEmbedding or the path of a saved one",
        ),
        (
            {"prompt_embedding": TextEmbedding(torch.zeros(8), torch.zeros(8), "", "")},
            "tokens must be a dense tensor of floating-point numbers with 2 axes",
        ),
        ({"prompt_embedding": TextEmbedding(torch.zeros(1, 8), torch.full((8,), torch.nan), "", "")}, "pooled must be finite"),
        (
            {"prompt_embedding": TextEmbedding(torch.zeros(4, 8), torch.zeros(8), "", "", padding=5)},
            "research.prompt_embedding.padding must be None or a whole number from 0 to 4, the rows of tokens, got 5",
        ),
        (
            {"prompt_embedding": TextEmbedding(torch.zeros(4, 8), torch.zeros(8), "", "", padding=-1)},
            "padding must be None or a whole number from 0 to 4",
        ),
        ({"style_tokens": [torch.zeros(4, 8)]}, "research.style_tokens[0] must be StyleTokens or the path of saved ones"),
        ({"style_tokens": NO_TENSOR}, "research.style_tokens[0].tokens must be a tensor, got ndarray"),
        ({"content_images": [None]}, "research.content_images[0] must be a path, URL"),
        ({"style_images": 3}, "research.style_images[0] must be a path, URL"),
        ({"position_offset": "x"}, "research.position_offset must be one of 'd', 'h', 'w', 'o', got 'x'"),
        ({"position_offset": 3}, "research.position_offset must be one of 'd', 'h', 'w', 'o', got 3"),
        ({"posterior_seed": 1.5}, "research.posterior_seed must be a whole number from 0 to"),
        ({"posterior_seed": -1}, "research.posterior_seed must be a whole number from 0 to"),
        ({"reference_numerics": 1}, "research.reference_numerics must be True or False, got 1"),
    ],
)
def test_wrong_research_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ResearchOptions(**options)


def test_research_options_are_taken_in_their_natural_forms() -> None:
    tokens = StyleTokens(torch.zeros(4, 8), "", "")
    buffer = bytearray(b"data")
    given: dict[str, Any] = {"sigmas": np.linspace(1, 0, 3), "style_tokens": tokens, "posterior_seed": np.int64(7)}
    options = ResearchOptions(content_images=PICTURE, style_images=[buffer], **given)  # type: ignore[arg-type]
    buffer[:] = b"gone"
    assert options.sigmas == (1.0, 0.5, 0.0)
    assert options.style_tokens == (tokens,)
    assert options.content_images == (PICTURE,)
    assert options.style_images == (b"data",)
    assert options.posterior_seed == 7
    assert ResearchOptions(sigmas=torch.tensor([1.0, 0.0])).sigmas == (1.0, 0.0)  # type: ignore[arg-type]


def test_a_bar_on_wish(engine: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # A terminal, or nothing but its end would be written, and not a dumb one.
    monkeypatch.setenv("TERM", "xterm")
    seen: list[int] = []

    def look(step: Step) -> None:
        seen.append(step.index)

    fields = {**SMALL, "num_inference_steps": 3, "seed": 1}
    with redirect_stderr(io.StringIO()) as silent:
        expected = engine.generate("a", on_step=look, **fields)
    with redirect_stderr(io.StringIO()) as shown:
        result = engine.generate("a", on_step=look, progress=True, **fields)
    assert seen == [0, 1, 2] * 2
    assert result.images[0].tobytes() == expected.images[0].tobytes()
    assert silent.getvalue() == ""
    assert "step 3/3" in shown.getvalue()


def test_a_list_of_prompts_is_made_in_its_order(engine: USOEngine) -> None:
    arguments: dict[str, Any] = {"image": PICTURE, "width": 64, "height": 64, "num_inference_steps": 1}
    both = engine(["a cup", "a tree"], seed=5, num_images_per_prompt=2, negative_prompt=["blue", "red"], **arguments)
    assert [result.prompt for result in both] == ["a cup", "a tree"]
    assert [result.seeds for result in both.results] == [(5, 6), (7, 8)]
    assert len(both) == 2
    alone = engine("a tree", seed=7, num_images_per_prompt=2, negative_prompt="red", **arguments)
    assert [image.tobytes() for image in both.images[2:]] == [image.tobytes() for image in alone.images]
    assert both[1].images == both.images[2:]
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    assert [result.seed for result in engine(("a", "b"), generator=generators, **arguments)] == [9, 9]
    # All of them are checked before the first one runs.
    steps: list[object] = []
    nothing: Any = None
    with pytest.raises(ValueError, match="prompt must be a string, got null"):
        engine(["a", nothing], callback_on_step_end=lambda *step: steps.append(step), **arguments)
    assert steps == []


def test_diffusers_callback_may_return_latents(engine: USOEngine) -> None:
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}

    def halve(pipe: object, index: int, sigma: float, given: dict[str, tuple[torch.Tensor, ...]]) -> dict[str, object]:
        return {"latents": tuple(latent * 0.5 for latent in given["latents"])}

    def halve_in_place(step: Step) -> None:
        step.latents[0].mul_(0.5)

    expected = engine.generate("a cup", on_step=halve_in_place, seed=5, **{**SMALL, "num_inference_steps": 2})
    assert engine("a cup", callback_on_step_end=halve, **arguments).images[0].tobytes() == expected.images[0].tobytes()
