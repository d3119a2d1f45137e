"""What a researcher may change in a generation that no request schema offers."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from uso_engine.imaging.open import ImageSource
from uso_engine.imaging.rgb import Alpha
from uso_engine.sampling.sampler import LARGEST_SHIFT, SAMPLERS, SamplerName
from uso_engine.sampling_settings import TextPadding

from .fields import checked_image, checked_switch, image_problem, plain_real, plain_whole
from .messages import shown

if TYPE_CHECKING:
    from torch import Tensor

    from uso_engine.conditioning.style import StyleTokens
    from uso_engine.conditioning.text import TextEmbedding
    from uso_engine.model.rope import PositionOffset


@dataclass(frozen=True)
class ResearchOptions:
    """Additions to a request, from Python only.

    Args:
        latents: [n, 16, h / 8, w / 8] to start from instead of noise; n is the request's number of images.
        sigmas: a schedule of one's own: steps + 1 strictly falling numbers between 1 and 0; the request's steps are not read.
        strength: start from the content image instead of noise, over 0 and at most 1: of n steps only the last
            ceil(n * strength) are taken, from (1 - sigma) * picture + sigma * noise at the sigma where they begin; 1 is noise
            alone. The picture is scaled to cover the output and cut at the centre; it stays a reference as well.
        prompt_embedding: instead of encoding the request's prompt; a path is loaded.
        style_tokens: after the request's style images; paths are loaded.
        content_images: more content images after the request's.
        style_images: more style images after the request's.
        position_offset: how content images are placed: beyond the output and each other in rows and columns ("d"), in rows
            ("h"), in columns ("w"), or all at the output's own place ("o"); None: as the model was trained, which is "d".
        posterior_seed: draw content latents from the autoencoder's posterior with this seed instead of taking its mean.
        alpha: what becomes of transparent pixels in the pictures: "white" lays them on white, "drop" takes the colours stored
            beneath, as the authors do.
        reference_numerics: keep time, noise and latents in the model's dtype, as the authors do; with Euler steps alone.
        sampler: what makes a step of the velocity, "euler", "ab2" or "unipc"; None for the configuration's.
        shift: of the schedule, over 0 and at most 100: 1 spaces steps evenly, more stays longer near noise; None for the
            configuration's.
        cosine: with a shift: from 0 to 1, the share of cosine spacing, which makes steps shorter at both ends.
        text_padding: "merge" computes nearly equal rows of a prompt's padding as one, which is attended to as often; "keep"
            computes all, as the authors do; None for the configuration's.
        loras: to be in the weights beside the configuration's instead of what `USOEngine.set_loras` put there: paths (from the
            working directory) or hub ids, each alone or with its weight. Requests with other LoRAs wait for each other.

    Raises:
        ValueError: a value of another type or outside its range, or two that contradict each other.
    """

    latents: Tensor | None = None
    sigmas: Sequence[float] | None = None
    strength: float | None = None
    prompt_embedding: TextEmbedding | str | Path | None = None
    style_tokens: Sequence[StyleTokens | str | Path] = ()
    content_images: Sequence[ImageSource] = ()
    style_images: Sequence[ImageSource] = ()
    position_offset: PositionOffset | None = None
    posterior_seed: int | None = None
    alpha: Alpha = "white"
    reference_numerics: bool = False
    sampler: SamplerName | None = None
    shift: float | None = None
    cosine: float = 0.0
    text_padding: TextPadding | None = None
    loras: Sequence[str | Path | tuple[str | Path, float]] | None = None

    def __post_init__(self) -> None:
        """Check every value, and keep what callers may change later as it is now."""
        set_field = object.__setattr__  # Frozen for everyone else.
        set_field(self, "latents", _checked_latents(self.latents))
        set_field(self, "sigmas", None if self.sigmas is None else _checked_numbers("sigmas", self.sigmas))
        set_field(self, "strength", _checked_strength(self.strength))
        set_field(self, "prompt_embedding", _checked_embedding(self.prompt_embedding))
        set_field(self, "style_tokens", _checked_style_tokens(self.style_tokens))
        for name in ("content_images", "style_images"):
            set_field(self, name, _checked_pictures(name, getattr(self, name)))
        _check_position_offset(self.position_offset)
        set_field(self, "posterior_seed", _checked_seed(self.posterior_seed))
        if not isinstance(self.alpha, str) or self.alpha not in ("white", "drop"):
            raise _refusal("alpha", "'white' or 'drop'", self.alpha)
        set_field(self, "reference_numerics", checked_switch("research.reference_numerics", self.reference_numerics))
        set_field(self, "sampler", _checked_sampler(self.sampler))
        set_field(self, "shift", _checked_shift(self.shift))
        set_field(self, "cosine", _checked_cosine(self.cosine, self.shift))
        set_field(self, "text_padding", _checked_text_padding(self.text_padding))
        if isinstance(self.loras, list):
            set_field(self, "loras", tuple(self.loras))  # What they name is checked where they are read.
        if self.latents is not None and self.strength is not None:
            raise ValueError("research.latents and research.strength both say what to start from; give one of them")


def _refusal(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"research.{name} must be {expected}, got {shown(value)}")


def _checked_latents(value: object) -> Tensor | None:
    if value is None:
        return None
    import torch

    if not isinstance(value, torch.Tensor):
        raise _refusal("latents", "a torch.Tensor [n, 16, h / 8, w / 8] (of a numpy array: torch.from_numpy)", value)
    _check_tensor("latents", value, 4)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checked_numbers(name: str, value: object) -> tuple[float, ...]:
    values = value
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # A numpy array or a tensor gives plain numbers,
        try:
            values = value.tolist()
        except (
            RuntimeError,
            TypeError,
            NotImplementedError,
        ):  # unless it holds none (a meta tensor) or not all (a sparse one).
            raise _refusal(name, "a list of numbers", value) from None
    if not isinstance(values, (list, tuple)) or not all(_is_number(entry) for entry in values):
        raise _refusal(name, "a list of numbers", value)
    try:
        return tuple(float(entry) for entry in values)
    except OverflowError as error:
        raise ValueError(f"research.{name} must be a list of numbers, got one that is too large") from error


def _checked_strength(value: object) -> float | None:
    if value is None:
        return None
    number = plain_real(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number <= 1:
        raise _refusal("strength", "a number over 0 and at most 1", value)
    return float(number)


def _checked_sampler(value: object) -> SamplerName | None:
    if value is None:
        return None
    for name in SAMPLERS:
        if isinstance(value, str) and value == name:
            return name
    raise _refusal("sampler", f"one of {', '.join(map(repr, SAMPLERS))}", value)


def _checked_text_padding(value: object) -> TextPadding | None:
    if value is None:
        return None
    names: tuple[TextPadding, ...] = get_args(TextPadding)
    for name in names:
        if isinstance(value, str) and value == name:
            return name
    raise _refusal("text_padding", " or ".join(map(repr, names)), value)


def _checked_shift(value: object) -> float | None:
    if value is None:
        return None
    number = plain_real(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number <= LARGEST_SHIFT:
        raise _refusal("shift", f"a number over 0 and at most {LARGEST_SHIFT:g}", value)
    return float(number)


def _checked_cosine(value: object, shift: float | None) -> float:
    number = plain_real(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= 1:
        raise _refusal("cosine", "a number from 0 to 1", value)
    if number and shift is None:
        raise ValueError(f"research.cosine={number:g} spaces the steps of a shift's schedule; give research.shift with it")
    return float(number)


def _checked_embedding(value: object) -> TextEmbedding | str | Path | None:
    if value is None or isinstance(value, (str, Path)):
        return value
    from uso_engine.conditioning.text import TextEmbedding

    if not isinstance(value, TextEmbedding):
        raise _refusal("prompt_embedding", "a TextEmbedding or the path of a saved one", value)
    _check_tensor("prompt_embedding.tokens", value.tokens, 2)
    _check_tensor("prompt_embedding.pooled", value.pooled, 1)
    padding, rows = value.padding, len(value.tokens)
    if padding is not None and not (type(padding) is int and 0 <= padding <= rows):
        raise _refusal("prompt_embedding.padding", f"None or a whole number from 0 to {rows}, the rows of tokens", padding)
    return value


def _checked_style_tokens(value: object) -> tuple[StyleTokens | str | Path, ...]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    checked: list[StyleTokens | str | Path] = []
    for i, entry in enumerate(values):
        if isinstance(entry, (str, Path)):
            checked.append(entry)
            continue
        from uso_engine.conditioning.style import StyleTokens

        if not isinstance(entry, StyleTokens):
            raise _refusal(f"style_tokens[{i}]", "StyleTokens or the path of saved ones", entry)
        _check_tensor(f"style_tokens[{i}].tokens", entry.tokens, 2)
        checked.append(entry)
    return tuple(checked)


def _check_tensor(name: str, value: object, axes: int) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        raise _refusal(name, "a tensor", value)
    dense = value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    if not dense or value.ndim != axes or 0 in value.shape:
        found = f"{list(value.shape)} of {value.dtype}, {value.layout} on {value.device}"
        raise ValueError(f"research.{name} must be a dense tensor of floating-point numbers with {axes} axes, got {found}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"research.{name} must be finite numbers")


def _checked_pictures(name: str, value: object) -> tuple[ImageSource, ...]:
    values: Sequence[ImageSource] = value if isinstance(value, (list, tuple)) else (value,)
    for i, entry in enumerate(values):
        problem = image_problem(f"research.{name}[{i}]", entry)
        if problem is not None:
            raise ValueError(problem)
    return tuple(checked_image(entry) for entry in values)


def _check_position_offset(value: object) -> None:
    if value is None:
        return  # The usual case, and no need for torch.
    from uso_engine.model.rope import POSITION_OFFSETS

    if not isinstance(value, str) or value not in POSITION_OFFSETS:
        raise _refusal("position_offset", f"one of {', '.join(map(repr, POSITION_OFFSETS))}", value)


def _checked_seed(value: object) -> int | None:
    if value is None:
        return None
    number = plain_whole(value)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
        raise _refusal("posterior_seed", f"a whole number from 0 to {2**63 - 1}", value)
    return number
