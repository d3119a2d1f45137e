"""Requests in the words of diffusers' pipelines, for people who come from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling.denoiser import OnStep

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
_OWN = ("image", "style_image", "width", "height", "generator", "callback_on_step_end", "output_type")


def request_from_diffusers(prompt: str, arguments: Mapping[str, object]) -> tuple[dict[str, object], OnStep | None]:
    """Turn diffusers' arguments into the fields of a request.

    Args:
        prompt: what to make.
        arguments: ``image`` (content, or a list: content, then styles), ``style_image`` (one or a list), ``width``, ``height``,
            ``num_inference_steps``, ``guidance_scale``, ``num_images_per_prompt``, ``generator`` (its initial seed is taken) or
            ``seed``, ``negative_prompt``, ``true_cfg_scale``, ``style_scale``, ``callback_on_step_end`` (called with
            None, index, sigma and {"latents": …}), ``output_type`` ("pil").

    Returns:
        Fields of `uso_engine.request.GenerationRequest`, and what to call after each step.

    Raises:
        ValueError: an argument that has no meaning here.
    """
    unknown = sorted(set(arguments) - set(_RENAMED) - set(_OWN))
    if unknown:
        raise ValueError(f"unknown arguments {', '.join(unknown)}; known: prompt, {', '.join(sorted({*_RENAMED, *_OWN}))}")
    if arguments.get("output_type", "pil") != "pil":
        raise ValueError(f"output_type must be 'pil', got {arguments['output_type']!r}; latents are in the result's latents")
    fields: dict[str, object] = {ours: arguments[name] for name, ours in _RENAMED.items() if arguments.get(name) is not None}
    fields["prompt"] = prompt
    images = [*_listed(arguments.get("image"))]
    styles = _listed(arguments.get("style_image"))
    if styles and not images:
        images = [None]
    fields["images"] = [*images, *styles]
    width, height = arguments.get("width"), arguments.get("height")
    if (width is None) != (height is None):
        raise ValueError(f"width and height come together, got width {width} and height {height}")
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

    def on_step(step: object) -> None:
        from .sampling.denoiser import Step

        assert isinstance(step, Step)
        function(None, step.index, step.sigmas[0], {"latents": step.latents})

    return on_step
