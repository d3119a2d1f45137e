"""What callers hand to the engine's methods, checked: what is wrong is a `ValueError` that says what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from threading import TIMEOUT_MAX
from types import NoneType
from typing import TYPE_CHECKING

from .api.fields import MAX_PROMPT, checked_image, image_problem, plain_real, plain_whole
from .api.messages import shown
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .errors import SafetyError
from .imaging.source import ImageSource

if TYPE_CHECKING:
    from torch import Tensor

    from .config import SafetyConfig
    from .sampling.step import OnStep


def request_of(request: object, fields: Mapping[str, object], kind: type[GenerationRequest]) -> GenerationRequest:
    """The request that `generate` was called with.

    Args:
        request: a request, a prompt, or None.
        fields: of a request, given as keywords.
        kind: the engine's own request class.

    Raises:
        ValueError: neither or both, something else, or outside the limits.
    """
    named = ", ".join(sorted(fields))
    if isinstance(request, str):
        if "prompt" in fields:
            raise ValueError("the prompt is given twice, as the first argument and as prompt=; give one of them")
        return kind.model_validate({**fields, "prompt": request})
    if request is None:
        return kind.model_validate(fields)
    if not isinstance(request, GenerationRequest):
        hint = "; a mapping of fields goes in as keywords: generate(**fields)" if isinstance(request, Mapping) else ""
        hint = "; several prompts go to the engine itself: engine([…])" if isinstance(request, (list, tuple)) else hint
        raise ValueError(f"expected a GenerationRequest, a prompt, or fields as keywords, got {shown(request)}{hint}")
    if fields:
        raise ValueError(f"give a request or its fields, not both; got a request and {named}")
    return request.fitted_to(kind)


def checked_options(research: object) -> ResearchOptions:
    """Research options, or none; ValueError for anything else."""
    if research is None:
        return ResearchOptions()
    if not isinstance(research, ResearchOptions):
        raise ValueError(f"research must be ResearchOptions, got {shown(research)}")
    return research


def checked_on_step(on_step: OnStep | None) -> OnStep | None:
    """What is called after each step; ValueError where it cannot be."""
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step must be a function that takes a Step, got {shown(on_step)}")
    return on_step


def checked_scheduling(priority: object, timeout_s: object) -> tuple[int, float | None]:
    """Priority and time limit of a request, as numbers of Python's own types; ValueError for what they cannot be."""
    level = plain_whole(priority)
    if not isinstance(level, int) or isinstance(level, bool) or not -10 <= level <= 10:
        raise ValueError(f"priority must be a whole number from -10 to 10, got {shown(priority)}")
    if timeout_s is None:
        return level, None
    seconds = plain_real(timeout_s)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise ValueError(f"timeout_s must be a number of seconds over 0, or None, got {shown(timeout_s)}")
    return level, seconds


def checked_deadline(deadline_s: object) -> float:
    """Seconds until something is cut off; ValueError for what they cannot be."""
    seconds = plain_real(deadline_s)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds >= 0:
        raise ValueError(f"deadline_s must be a number of seconds from 0, got {shown(deadline_s)}")
    # Longer than a thread can wait is no bound.
    return inf if seconds > TIMEOUT_MAX else float(seconds)


def checked_prompt(prompt: object) -> str:
    """A prompt by itself, under the same rule as a request's; ValueError for anything else."""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {shown(prompt)}")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt must have at most {MAX_PROMPT} characters, got {len(prompt)}")
    return prompt


def checked_picture(name: str, image: object) -> ImageSource:
    """A picture by itself; ValueError for what is none."""
    problem = image_problem(name, image)
    if problem is not None:
        raise ValueError(problem)
    source: ImageSource = image  # type: ignore[assignment]  # image_problem has seen it.
    return checked_image(source)


def check_safety(request: GenerationRequest, settings: SafetyConfig | None, *, has_checker: bool) -> None:
    """Refuse before anything runs what could only be withheld afterwards.

    Raises:
        SafetyError: the checker is asked for, and there is none.
        ValueError: it is not asked for, and the configuration forbids that.
    """
    if request.enable_safety_checker:
        if not has_checker:
            raise SafetyError(
                "enable_safety_checker is true, but this configuration names no [safety] checker; "
                "add one, or set enable_safety_checker to false"
            )
    elif settings is not None and settings.forbid_disabling:
        raise ValueError("enable_safety_checker must be true: this engine's configuration forbids switching it off")


def shown_latent(step: object, image: object) -> Tensor:
    """The latent that `preview` shows, [16, h / 8, w / 8]; ValueError unless it is given a step and one of its images."""
    from .sampling.step import Step

    if not isinstance(step, Step):
        raise ValueError(f"step must be what on_step was given, got {shown(step)}")
    count = len(step.grids)
    number = plain_whole(image)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        raise ValueError(f"image must be a whole number from 0 to {count - 1}, got {shown(image)}")
    return step.estimated_clean(number)


def check_loading(
    config: object, device: object, dtype: object, attention: object, image_limits: object, progress: object
) -> None:
    """What `from_config` is given; ValueError for another type."""
    import torch

    from .config import EngineConfig
    from .imaging.open import ImageLimits

    named = "a configuration's name, the path of a TOML file, or an EngineConfig"
    for name, value, kinds, expected in (
        ("config", config, (str, Path, EngineConfig), named),
        ("device", device, (str, torch.device, NoneType), "'cpu', 'cuda', 'cuda:N' or a torch.device"),
        ("attention", attention, (str,), "an attention backend's name or 'auto'"),
        ("image_limits", image_limits, (ImageLimits, NoneType), "ImageLimits"),
    ):
        if not isinstance(value, kinds):
            raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    if not (dtype is None or isinstance(dtype, torch.dtype)) or dtype not in (None, torch.float32, torch.bfloat16):
        found = dtype if isinstance(dtype, torch.dtype) else shown(dtype)
        raise ValueError(
            f"dtype must be torch.float32 or torch.bfloat16, got {found}; other tiers are set in the configuration"
        )
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function that takes a part, bytes done and bytes in all, got {shown(progress)}")
