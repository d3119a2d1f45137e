"""How a request gets from noise to its latent: what it says itself, else what the configuration says."""

from __future__ import annotations

from dataclasses import dataclass

from uso_engine.api.research import ResearchOptions
from uso_engine.config import EngineConfig
from uso_engine.sampling.family import Family
from uso_engine.sampling.sampler import SAMPLERS, SamplerName
from uso_engine.sampling.schedule import check_sigmas, shifted_schedule
from uso_engine.sampling.strength import last_steps


@dataclass(frozen=True)
class ChosenSampling:
    """The ways of a request, beside its number of steps.

    Args:
        sampler: what makes a step of the velocity.
        shift: of the schedule, instead of the family's.
        sigmas: a schedule of the request's own.
        strength: the share of the steps that is taken; None for all.
    """

    sampler: SamplerName = "euler"
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    strength: float | None = None

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
            whole = family.counted_sigmas(steps, *size) if self.shift is None else shifted_schedule(steps, self.shift)
        taken = tuple(whole) if self.strength is None else last_steps(whole, self.strength)
        SAMPLERS[self.sampler].updates(taken)  # It may refuse.
        return taken

    def record(self) -> dict[str, object]:
        """What of it is not the authors' way, plain JSON."""
        record: dict[str, object] = {} if self.sampler == "euler" else {"sampler": self.sampler}
        return record if self.shift is None else record | {"shift": self.shift}


def choose_sampling(config: EngineConfig, options: ResearchOptions) -> ChosenSampling:
    """Put together what a request and its engine's configuration say.

    Raises:
        ValueError: options that exclude each other.
    """
    sampler = options.sampler if options.sampler is not None else config.sampling.sampler
    shift = options.shift if options.shift is not None else config.sampling.shift
    if options.sigmas is not None:
        if options.shift is not None:
            raise ValueError(f"research.sigmas and research.shift={shift:g} both say what the sigmas are; give one of them")
        shift = None
    if options.reference_numerics and sampler != "euler":
        raise ValueError(
            f"research.reference_numerics are those of the authors' Euler steps, but the sampler is {sampler!r}; "
            "give sampler='euler' with it"
        )
    return ChosenSampling(sampler, shift, None if options.sigmas is None else tuple(options.sigmas), options.strength)
