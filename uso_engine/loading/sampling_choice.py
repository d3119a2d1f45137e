"""How a request gets from noise to its latent: what it says itself, else what the configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from uso_engine.api.messages import shown
from uso_engine.api.request import GenerationRequest
from uso_engine.api.research import ResearchOptions
from uso_engine.config import EngineConfig
from uso_engine.sampling.family import Family
from uso_engine.sampling.sampler import SAMPLERS, SamplerName
from uso_engine.sampling.schedule import check_sigmas, shifted_schedule
from uso_engine.sampling.strength import last_steps
from uso_engine.sampling_settings import QualityName, TextPadding


@dataclass(frozen=True)
class ChosenSampling:
    """The ways of a request, beside its number of steps.

    Args:
        sampler: what makes a step of the velocity.
        shift: of the schedule, instead of the family's.
        cosine: the share of cosine spacing in a shift's schedule.
        sigmas: a schedule of the request's own.
        strength: the share of the steps that is taken; None for all.
        quality: the named point that it is, if it is one.
        text_padding: what becomes of prompts' padding.
    """

    sampler: SamplerName = "euler"
    shift: float | None = None
    cosine: float = 0.0
    sigmas: tuple[float, ...] | None = None
    strength: float | None = None
    quality: QualityName = "reference"
    text_padding: TextPadding = "keep"

    def schedule(self, steps: int, size: tuple[int, int], family: Family) -> tuple[float, ...]:
        """The sigmas of a run, from where it starts.

        Args:
            steps: that the request asks for; not read where it has sigmas of its own.
            size: width and height in pixels.
            family: whose schedule it is, where no shift is given.

        Raises:
            ValueError: sigmas that do not fall, or that the sampler cannot take.
        """
        if self.sigmas is not None:
            whole = check_sigmas(self.sigmas)
        else:
            shift = self.shift
            whole = family.counted_sigmas(steps, *size) if shift is None else shifted_schedule(steps, shift, self.cosine)
        taken = tuple(whole) if self.strength is None else last_steps(whole, self.strength)
        SAMPLERS[self.sampler].updates(taken)  # It may refuse.
        return taken

    def record(self) -> dict[str, object]:
        """What of it is not the authors' way, plain JSON."""
        record: dict[str, object] = {} if self.quality == "reference" else {"quality": self.quality}
        record |= {} if self.sampler == "euler" else {"sampler": self.sampler}
        record |= {} if self.shift is None else {"shift": self.shift}
        return record | ({"cosine": self.cosine} if self.cosine else {})


def choose_sampling(config: EngineConfig, options: ResearchOptions, quality: QualityName = "reference") -> ChosenSampling:
    """Put together what a request and its engine's configuration say.

    Args:
        config: of the engine.
        options: of the request.
        quality: the point of the configuration that the request asks for, as `with_quality` has checked it.

    Raises:
        ValueError: options that exclude each other.
    """
    usual = config.quality.named.get(quality, config.sampling)
    sampler = options.sampler if options.sampler is not None else usual.sampler
    # A shift of one's own is a schedule of one's own: the configuration's spacing goes with the configuration's shift.
    shift, cosine = (usual.shift, usual.cosine) if options.shift is None else (options.shift, options.cosine)
    if options.sigmas is not None:
        if options.shift is not None:
            raise ValueError(f"research.sigmas and research.shift={shift:g} both say what the sigmas are; give one of them")
        shift, cosine = None, 0.0
    if options.reference_numerics and sampler != "euler":
        raise ValueError(
            f"research.reference_numerics are those of the authors' Euler steps, but the sampler is {sampler!r}; "
            "give sampler='euler' with it"
        )
    text_padding = usual.text_padding if options.text_padding is None else options.text_padding
    if options.reference_numerics and text_padding != "keep":
        raise ValueError(
            f"research.reference_numerics are the authors', who compute all of a prompt's padding, but text_padding is "
            f"{text_padding!r}; give text_padding='keep' with it"
        )
    sigmas = None if options.sigmas is None else tuple(options.sigmas)
    return ChosenSampling(sampler, shift, cosine, sigmas, options.strength, quality, text_padding)


def with_quality(
    config: EngineConfig, request: GenerationRequest, options: ResearchOptions, quality: object
) -> tuple[GenerationRequest, QualityName]:
    """A request with the steps of a named point of its engine's configuration.

    Args:
        config: of the engine.
        request: of the engine's own kind.
        options: of the request.
        quality: what the caller gave; None is "reference".

    Returns:
        The request and the name; for "reference" the request as it was.

    Raises:
        ValueError: no such name, a point that the configuration does not have, or something that says otherwise.
    """
    name = "reference" if quality is None else _quality_name(quality)
    if name == "reference":
        return request, name
    point = config.quality.named.get(name)
    if point is None:
        there = ", ".join(map(repr, ("reference", *config.quality.named)))
        raise ValueError(
            f"quality={name!r} is a measured point, and configuration {config.name} has only {there}: nothing was measured "
            "with its model; ask for fewer steps or another sampler by their own names"
        )
    _refuse_what_it_decides(name, request, options)
    return request.model_copy(update={"num_inference_steps": point.steps}), name


def _quality_name(value: object) -> QualityName:
    names: tuple[QualityName, ...] = get_args(QualityName)
    for name in names:
        if isinstance(value, str) and value == name:
            return name
    raise ValueError(f"quality must be one of {', '.join(map(repr, names))}, got {shown(value)}")


def _refuse_what_it_decides(name: str, request: GenerationRequest, options: ResearchOptions) -> None:
    """ValueError where the request says itself what a point is made of."""
    given = [f"research.{field}" for field in ("sigmas", "sampler", "shift") if getattr(options, field) is not None]
    given += ["num_inference_steps"] if "num_inference_steps" in request.model_fields_set else []
    if given:
        raise ValueError(f"quality={name!r} decides steps, sampler and schedule; leave out {' and '.join(given)}, or quality")
