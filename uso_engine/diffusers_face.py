"""The engine called the way diffusers' pipelines are: ``engine(prompt, image=…, width=…).images``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, overload

from .api.diffusers_call import LONGEST_SEQUENCE, Answer, ConvertedResults, PromptResults, call_like_diffusers
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .api.result import GenerationResult
from .config import EngineConfig
from .sampling.step import OnStep
from .sampling_settings import QualityName


class DiffusersFace(ABC):
    """What can be called with diffusers' names because it generates with ours."""

    config: EngineConfig
    request_type: type[GenerationRequest]

    @abstractmethod
    def generate(
        self,
        request: GenerationRequest | str | None = None,
        *,
        on_step: OnStep | None = None,
        research: ResearchOptions | None = None,
        progress: bool = False,
        priority: int = 0,
        timeout_s: float | None = None,
        quality: QualityName | None = None,
        **fields: object,
    ) -> GenerationResult:
        """Make the images of a request."""

    # What these two name is among the others' arguments, too: a type checker takes the first that fits.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, prompt: str | list[str] = "", *, return_dict: Literal[False], **arguments: object
    ) -> tuple[object]: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, prompt: str | list[str] = "", *, output_type: Literal["np", "pt", "latent"], **arguments: object
    ) -> ConvertedResults: ...

    @overload
    def __call__(self, prompt: str = "", **arguments: object) -> GenerationResult: ...

    @overload
    def __call__(self, prompt: list[str] | tuple[str, ...], **arguments: object) -> PromptResults: ...

    def __call__(self, prompt: str | list[str] | tuple[str, ...] = "", **arguments: object) -> Answer:
        """Generate the way diffusers' pipelines are called: ``engine(prompt, image=…, width=…).images``.

        Args:
            prompt: what to make; of a list, one after the other: the results together have all ``images``, as they have of one
                prompt with a list of generators.
            arguments: diffusers' names, see `uso_engine.api.diffusers_call`.

        Raises:
            ValueError: an argument that has no meaning here.
        """
        text_length = LONGEST_SEQUENCE if self.config.t5 is None else self.config.t5.max_length
        return call_like_diffusers(self.generate, self.request_type, prompt, arguments, text_length=text_length)
