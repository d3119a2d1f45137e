"""Requests in the words of diffusers' pipelines, for people who come from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from .diffusers_callback import step_callback
from .diffusers_results import ConvertedResults, PromptResults, checked_output_type, converted
from .fields import asks_for_a_seed, checked_switch, image_seeds, plain_whole
from .messages import shown, suggested

if TYPE_CHECKING:
    from uso_engine.sampling.step import OnStep

    from .request import GenerationRequest
    from .result import GenerationResult

__all__ = ["ConvertedResults", "PromptResults", "call_like_diffusers", "request_from_diffusers"]

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
_OWN = (
    "image",
    "style_image",
    "width",
    "height",
    "generator",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "max_sequence_length",
    "output_type",
    "return_dict",
    "progress",
)
LONGEST_SEQUENCE = 512
"""What diffusers' pipeline takes at most for ``max_sequence_length``."""

Answer: TypeAlias = "GenerationResult | PromptResults | ConvertedResults | tuple[object]"


def call_like_diffusers(
    generate: Callable[..., GenerationResult],
    kind: type[GenerationRequest],
    prompt: object,
    arguments: Mapping[str, object],
    *,
    text_length: int = LONGEST_SEQUENCE,
) -> Answer:
    """Make the images of one prompt, or of each prompt of a list; every request is checked before the first one runs.

    Args:
        generate: the engine's method.
        kind: the engine's request class.
        prompt: one, or a list. With a seed or one generator, prompt k of a list starts at seed + k * num_images_per_prompt, so
            that no two of its images share their noise; ``negative_prompt`` may be a list of the same length, and ``generator``
            one of that length or with one for each image.
        arguments: see `request_from_diffusers`; and ``output_type``: "pil", "np", "pt" or "latent", and ``return_dict``.
        text_length: tokens that the engine pads prompts to, the least that ``max_sequence_length`` may be.

    Raises:
        ValueError: an argument that has no meaning here.
    """
    _refuse_unknown(arguments)
    output_type = checked_output_type(arguments.get("output_type", "pil"))
    returns_dict = checked_switch("return_dict", arguments.get("return_dict", True))
    _check_sequence_length(arguments.get("max_sequence_length"), text_length)
    progress = arguments.get("progress", False)
    several = isinstance(prompt, (list, tuple))
    if several and not prompt:
        raise ValueError("prompt must be a string or a list of at least one, got an empty list")
    requests = _requests(kind, list(prompt) if isinstance(prompt, (list, tuple)) else [prompt], arguments)
    results = tuple(generate(request, on_step=on_step, progress=progress) for request, on_step in requests)
    answer: GenerationResult | PromptResults | ConvertedResults
    if output_type != "pil":
        answer = converted(results, output_type)
    else:
        answer = PromptResults(results) if several or len(results) > 1 else results[0]
    return answer if returns_dict else (answer.images,)


def _requests(
    kind: type[GenerationRequest], prompts: list[object], arguments: Mapping[str, object]
) -> list[tuple[GenerationRequest, OnStep | None]]:
    """The requests of one call, checked: one for each prompt, or one for each image where each has a generator of its own."""
    requests = []
    for place, text in enumerate(prompts):
        fields, on_step = request_from_diffusers(text, _of_place(arguments, place, len(prompts)))
        request = kind.model_validate({name: value for name, value in fields.items() if name != "seeds"})
        own = fields.get("seeds")
        if isinstance(own, list):
            each = [kind.model_validate({**_without(fields, "seeds"), "num_images": 1, "seed": seed}) for seed in own]
            if len(each) != request.num_images:
                raise ValueError(f"generator must be one, or one for each of the {request.num_images} images, got {len(each)}")
            requests += [(one, on_step) for one in each]
            continue
        if len(prompts) > 1 and request.seed is not None and not isinstance(arguments.get("generator"), (list, tuple)):
            # As if all of them were images of one request.
            seeds = image_seeds(request.seed, len(prompts) * request.num_images)
            request = kind.model_validate({**fields, "seed": seeds[place * request.num_images]})
        requests.append((request, on_step))
    return requests


def _without(fields: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key != name}


def _of_place(arguments: Mapping[str, object], place: int, count: int) -> dict[str, object]:
    """The arguments of one prompt of a list."""
    chosen = dict(arguments)
    given = plain_whole(arguments.get("num_images_per_prompt") or 1)
    images = given if isinstance(given, int) else 1
    for name in ("generator", "negative_prompt"):
        value = arguments.get(name)
        if not isinstance(value, (list, tuple)):
            continue
        if name == "generator" and images > 1 and len(value) == count * images:
            chosen[name] = list(value[place * images : (place + 1) * images])
        elif len(value) == count and not (name == "generator" and images > 1 and count == 1):
            chosen[name] = value[place]
        else:
            wanted = [f"the {count} prompts"] if count > 1 or images == 1 else []
            wanted += [f"the {count * images} images"] if name == "generator" and images > 1 else []
            raise ValueError(f"{name} must be one, or one for each of {' or of '.join(wanted)}, got a list of {len(value)}")
    return chosen


def request_from_diffusers(prompt: object, arguments: Mapping[str, object]) -> tuple[dict[str, object], OnStep | None]:
    """Turn diffusers' arguments into the fields of a request.

    Args:
        prompt: what to make.
        arguments: ``image`` (content, or a list: content, then styles), ``style_image`` (one or a list), ``width``, ``height``,
            ``num_inference_steps``, ``guidance_scale``, ``num_images_per_prompt``, ``generator`` (its initial seed is taken; a
            list of them, one for each image) or ``seed`` (-1 draws one), ``negative_prompt``, ``true_cfg_scale``,
            ``style_scale``, ``callback_on_step_end`` and ``callback_on_step_end_tensor_inputs`` (see `step_callback`),
            ``progress``.

    Returns:
        Fields of `uso_engine.api.request.GenerationRequest`, with ``seeds`` where each image has a generator; and what to call
        after each step.

    Raises:
        ValueError: an argument that has no meaning here.
    """
    _refuse_unknown(arguments)
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
    if asks_for_a_seed(fields.get("seed")):
        del fields["seed"]
    generator = arguments.get("generator")
    if generator is not None:
        if arguments.get("seed") is not None:
            raise ValueError("give generator or seed, not both")
        if isinstance(generator, (list, tuple)):
            fields["seeds"] = [_initial_seed(one) for one in generator]
        else:
            fields["seed"] = _initial_seed(generator)
    callback = step_callback(arguments.get("callback_on_step_end"), arguments.get("callback_on_step_end_tensor_inputs"))
    return fields, callback


def _initial_seed(generator: object) -> object:
    initial_seed = getattr(generator, "initial_seed", None)
    if not callable(initial_seed):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return initial_seed()


def _check_sequence_length(value: object, text_length: int) -> None:
    """Prompts have the length of the configuration; more room than that changes nothing, less would."""
    length, most = plain_whole(value), max(LONGEST_SEQUENCE, text_length)
    if value is None or (isinstance(length, int) and not isinstance(length, bool) and text_length <= length <= most):
        return
    raise ValueError(
        f"max_sequence_length must be a whole number from {text_length}, the length that this configuration pads prompts to, "
        f"to {most}, got {shown(value)}"
    )


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
