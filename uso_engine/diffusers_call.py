"""Requests in the words of diffusers' pipelines, for people who come from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .request_fields import image_seeds
from .request_messages import shown, suggested

if TYPE_CHECKING:
    from PIL.Image import Image

    from .request import GenerationRequest
    from .result import GenerationResult
    from .sampling.denoiser import OnStep, Step

_RENAMED = {
    "num_images_per_prompt": "num_images",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "true_cfg_scale": "true_cfg_scale",
    "style_scale": "style_scale",
    "seed": "seed",
    "enable_safety_checker": "enable_safety_checker",
}
_OWN = ("image", "style_image", "width", "height", "generator", "callback_on_step_end", "output_type", "progress")


@dataclass(frozen=True)
class PromptResults:
    """Results of a list of prompts, in its order.

    Args:
        results: one for each prompt.
    """

    results: tuple[GenerationResult, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """All images, those of the first prompt first."""
        return tuple(image for result in self.results for image in result.images)

    def __iter__(self) -> Iterator[GenerationResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> GenerationResult:
        return self.results[index]


def call_like_diffusers(
    generate: Callable[..., GenerationResult],
    kind: type[GenerationRequest],
    prompt: object,
    arguments: Mapping[str, object],
) -> GenerationResult | PromptResults:
    """Make the images of one prompt, or of each prompt of a list; every request is checked before the first one runs.

    Args:
        generate: the engine's method.
        kind: the engine's request class.
        prompt: one, or a list. With a seed or one generator, prompt k of a list starts at seed + k * num_images_per_prompt, so
            that no two of its images share their noise; ``generator`` and ``negative_prompt`` may be lists of the same length.
        arguments: see `request_from_diffusers`.

    Raises:
        ValueError: an argument that has no meaning here.
    """
    progress = arguments.get("progress", False)
    if not isinstance(prompt, (list, tuple)):
        fields, on_step = request_from_diffusers(prompt, arguments)
        return generate(kind.model_validate(fields), on_step=on_step, progress=progress)
    if not prompt:
        raise ValueError("prompt must be a string or a list of at least one, got an empty list")
    requests = []
    for place, text in enumerate(prompt):
        fields, on_step = request_from_diffusers(text, _of_place(arguments, place, len(prompt)))
        request = kind.model_validate(fields)
        if request.seed is not None and not isinstance(arguments.get("generator"), (list, tuple)):
            # As if all of them were images of one request.
            seeds = image_seeds(request.seed, len(prompt) * request.num_images)
            request = kind.model_validate({**fields, "seed": seeds[place * request.num_images]})
        requests.append((request, on_step))
    return PromptResults(tuple(generate(request, on_step=on_step, progress=progress) for request, on_step in requests))


def _of_place(arguments: Mapping[str, object], place: int, count: int) -> dict[str, object]:
    """The arguments of one prompt of a list."""
    chosen = dict(arguments)
    for name in ("generator", "negative_prompt"):
        value = arguments.get(name)
        if isinstance(value, (list, tuple)):
            if len(value) != count:
                raise ValueError(f"{name} must be one, or one for each of the {count} prompts, got a list of {len(value)}")
            chosen[name] = value[place]
    return chosen


def request_from_diffusers(prompt: object, arguments: Mapping[str, object]) -> tuple[dict[str, object], OnStep | None]:
    """Turn diffusers' arguments into the fields of a request.

    Args:
        prompt: what to make.
        arguments: ``image`` (content, or a list: content, then styles), ``style_image`` (one or a list), ``width``, ``height``,
            ``num_inference_steps``, ``guidance_scale``, ``num_images_per_prompt``, ``generator`` (its initial seed is taken) or
            ``seed``, ``negative_prompt``, ``true_cfg_scale``, ``style_scale``, ``callback_on_step_end`` (called with
            None, index, sigma and {"latents": …}, the latents of every image; those it returns under that name are taken over),
            ``output_type`` ("pil"), ``progress``.

    Returns:
        Fields of `uso_engine.request.GenerationRequest`, and what to call after each step.

    Raises:
        ValueError: an argument that has no meaning here.
    """
    _refuse_unknown(arguments)
    if arguments.get("output_type", "pil") != "pil":
        found = shown(arguments["output_type"])
        raise ValueError(f"output_type must be 'pil', got {found}; latents are in the result's latents")
    fields: dict[str, object] = {ours: arguments[name] for name, ours in _RENAMED.items() if arguments.get(name) is not None}
    fields["prompt"] = prompt
    images = [*_listed(arguments.get("image"))]
    styles = _listed(arguments.get("style_image"))
    if styles and not images:
        images = [None]
    fields["images"] = [*images, *styles]
    width, height = arguments.get("width"), arguments.get("height")
    if (width is None) != (height is None):
        raise ValueError(f"width and height come together, got width {shown(width)} and height {shown(height)}")
    if width is not None:
        fields["image_size"] = {"width": width, "height": height}
    generator = arguments.get("generator")
    if generator is not None:
        if "seed" in fields:
            raise ValueError("give generator or seed, not both")
        initial_seed = getattr(generator, "initial_seed", None)
        if not callable(initial_seed):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        fields["seed"] = initial_seed()
    return fields, _step_callback(arguments.get("callback_on_step_end"))


def _refuse_unknown(arguments: Mapping[str, object]) -> None:
    known = ["prompt", *sorted({*_RENAMED, *_OWN})]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        near = {name: meant for name in unknown if (meant := suggested(name, known)) is not None}
        hints = "".join(f"; for {name} did you mean {meant}" for name, meant in near.items())
        raise ValueError(f"unknown arguments {', '.join(unknown)}{hints}; known: {', '.join(known)}")


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _step_callback(callback: object) -> OnStep | None:
    if callback is None:
        return None
    if not callable(callback):
        raise ValueError(f"callback_on_step_end must be callable, got {type(callback).__name__}")
    function: Callable[..., object] = callback

    def on_step(step: Step) -> None:
        answer = function(None, step.index, step.sigmas[0], {"latents": step.latents})
        if isinstance(answer, Mapping) and "latents" in answer:
            step.latents = answer["latents"]

    return on_step
