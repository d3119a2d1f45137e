"""The engine: a configuration, loaded; requests in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

import torch

from . import call_arguments, generation
from .api.diffusers_call import LONGEST_SEQUENCE, Answer, ConvertedResults, PromptResults, call_like_diffusers
from .api.fields import image_seeds
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .api.result import GenerationResult
from .conditioning.cache import CacheStatistics
from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .config import EngineConfig, load_config
from .errors import EngineClosedError
from .imaging.open import Alpha, ImageLimits, ImageSource, open_image
from .imaging.pixels import to_pixels
from .imaging.resize import resize_content
from .loading.assembly import check_device, load_parts
from .loading.lora_choice import LoRAChoice, read_chosen_loras
from .loading.transformer import LoadProgress
from .offload.budget import find_budget
from .offload.placement import release_cached_memory
from .pipeline import Pipeline
from .precision.tiers import FLOAT_TIERS
from .precision.transformer import DTYPES
from .process_state import clean_process_state
from .progress import StepProgress
from .provenance import log_warnings, result_of
from .request_type import request_type_of
from .sampling.denoiser import OnStep, Step
from .stopwatch import Stopwatch
from .turn import Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from .offload.plan import MemoryPlan
    from .safety import SafetyChecker

DTYPE_TIERS = {DTYPES[name]: tier for name, tier in FLOAT_TIERS.items()}


class USOEngine:
    """A loaded model; thread-safe, one request at a time. Made with `from_config`; usable in a ``with`` statement.

    Args:
        config: what it was made from.
        pipeline: the loaded parts.
        safety: the safety checker, if the configuration has one.
        device: where the parts are.
        image_limits: what is accepted as an input image, and from where.
    """

    def __init__(
        self,
        config: EngineConfig,
        pipeline: Pipeline,
        *,
        safety: SafetyChecker | None,
        device: torch.device,
        image_limits: ImageLimits | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self._pipeline: Pipeline | None = pipeline
        self._safety = safety
        self._image_limits = image_limits if image_limits is not None else ImageLimits()
        self._turn = Turn()
        self.request_type = request_type_of(config)

    @classmethod
    @clean_process_state()
    def from_config(
        cls,
        config: str | Path | EngineConfig,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        memory_budget_gib: float | None = None,
        image_limits: ImageLimits | None = None,
        progress: LoadProgress | None = None,
    ) -> USOEngine:
        """Load an engine.

        Args:
            config: a name from `uso_engine.config.list_configs`, a path to a TOML file, or a configuration.
            device: "cpu", "cuda" or "cuda:N"; by default the first GPU, or the CPU where there is none.
            dtype: torch.float32 or torch.bfloat16, instead of the configuration's precision tier.
            attention: attention backend by name; "auto" chooses.
            memory_budget_gib: GPU memory that may be used, instead of the configuration's; by default what the GPU has free.
                What finds no room comes from the host when it runs. On a CPU a budget only rehearses the plan, saving nothing.
            image_limits: what is accepted as an input image.
            progress: told what is being loaded.

        Raises:
            MissingFileError: a configuration or weight file is not there; says which and how to get it.
            ConfigError: a configuration that cannot be used.
            CheckpointError: weights that do not fit.
            BackendError: this machine cannot run what was asked for.
            MemoryBudgetError: the budget is too small; says for what.
            ValueError: another dtype, a budget that is not positive, or an argument of another type.
        """
        call_arguments.check_loading(config, device, dtype, attention, image_limits, progress)
        if not isinstance(config, EngineConfig):
            config = load_config(config)
        request_type_of(config)  # It may refuse: before minutes of loading.
        runs_on = check_device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
        tier = None if dtype is None else DTYPE_TIERS[dtype]
        asked = config.memory_budget_gib if memory_budget_gib is None else memory_budget_gib
        budget = find_budget(config, config.precision.tier if tier is None else tier, runs_on, asked)
        pipeline, safety = load_parts(config, device=runs_on, tier=tier, attention=attention, budget=budget, progress=progress)
        return cls(config, pipeline, safety=safety, device=runs_on, image_limits=image_limits)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What stays on the GPU and what comes from the host; None where everything stays."""
        placement = self.pipeline.placement
        return None if placement is None else placement.plan

    @property
    def pipeline(self) -> Pipeline:
        """The loaded parts, for research.

        Raises:
            EngineClosedError: the engine was closed.
        """
        if self._pipeline is None:
            raise EngineClosedError(f"engine {self.config.name} was closed; make a new one with USOEngine.from_config")
        return self._pipeline

    def generate(
        self,
        request: GenerationRequest | str | None = None,
        *,
        on_step: OnStep | None = None,
        research: ResearchOptions | None = None,
        progress: bool = False,
        **fields: object,
    ) -> GenerationResult:
        """Make the images of a request.

        Args:
            request: what to make, or its prompt; or give its fields as keywords: ``prompt="…", images=[…], seed=7``.
            on_step: called after each denoising step; may look, change the latents, stop, or cancel by raising.
            research: additions that no request schema offers.
            progress: show a bar over the steps on standard error.
            fields: of `GenerationRequest`.

        Returns:
            The images and what they cost.

        Raises:
            ValueError: a request outside the schema or this engine's limits, or another type; names field, limit and value.
            ImageError, FetchError, MissingFileError: an input image that cannot be used.
            SafetyError: the safety checker was asked for and could not run; the images are withheld.
            MemoryBudgetError: it needs more than the memory that was set as a budget.
            EngineClosedError: the engine was closed.
        """
        _ = self.pipeline  # A closed engine says so before anything else.
        checked = call_arguments.request_of(request, fields, self.request_type).with_seed()
        assert checked.seed is not None
        call_arguments.check_safety(checked, self.config.safety, has_checker=self._safety is not None)
        on_step = call_arguments.checked_on_step(on_step)
        options = generation.load_saved(self.pipeline, call_arguments.checked_options(research))
        if call_arguments.checked_switch("progress", progress):
            with StepProgress() as bar:
                return self.generate(checked, on_step=bar.beside(on_step), research=options)
        seeds = image_seeds(checked.seed, checked.num_images)
        checked = generation.with_reference_size(self.pipeline, checked, options)
        watch = Stopwatch(self.device)
        pictures, size = generation.open_pictures(self.pipeline, checked, options, self._image_limits, watch)

        @clean_process_state()
        def work() -> GenerationResult:
            pipeline = self.pipeline
            made = generation.run(pipeline, checked, options, pictures, size, seeds, watch, on_step=on_step)
            images, flags = made.images, (False,) * len(made.images)
            if checked.enable_safety_checker and self._safety is not None:
                with watch.stage("safety"):
                    images, flags = self._safety.screen(made.images)
            return result_of(
                self.config, pipeline, checked, options, made, seeds=seeds, images=images, flags=flags, seconds=watch.seconds
            )

        return self._turn.take(work)

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

    def encode_prompt(self, prompt: str) -> TextEmbedding:
        """Embed a prompt, to be saved or passed in later."""
        made = self._turn.take(lambda: self.pipeline.encode_prompt(call_arguments.checked_prompt(prompt)))
        log_warnings(made.warnings())
        return made

    def encode_style(self, image: ImageSource, *, alpha: Alpha = "white") -> StyleTokens:
        """Turn a style image into tokens, to be saved or passed in later; ``alpha`` as in `ResearchOptions`."""
        pixels = self.pipeline.style.preprocess(self._opened(image, "style image", alpha))
        return self._turn.take(lambda: self.pipeline.encode_style(pixels))

    def encode_content(self, image: ImageSource, *, alpha: Alpha = "white") -> Tensor:
        """Turn a content image into its latent [16, h / 8, w / 8]; ``alpha`` as in `ResearchOptions`."""
        picture = self._opened(image, "content image", alpha)
        pixels = to_pixels(resize_content(picture, long_side=self.config.content.long_side))
        return self._turn.take(lambda: self.pipeline.encode_content(pixels))

    def preview(self, step: Step, image: int = 0) -> Image:
        """Show where a run is heading, cheaply; from ``on_step``, while the engine is taken. Memory plans do not count it.

        Args:
            step: what ``on_step`` was given.
            image: which image.

        Returns:
            A small picture.
        """
        call_arguments.check_step(step, image)
        return generation.preview(self.pipeline, step.estimated_clean(image))

    def set_loras(self, loras: Sequence[LoRAChoice], *, keep_configured: bool = True) -> None:
        """Merge LoRAs into the weights, from the pristine ones; a second call replaces the first.

        Args:
            loras: paths (from the working directory) or hub ids, each alone or with its weight; an empty list takes all away.
            keep_configured: whether the configuration's LoRAs, USO's own among them, stay.

        Raises:
            ValueError: no such list, a weight that is no finite number, or a switch that is neither True nor False.
            MissingFileError: a file is not there.
            LoRAError: a file that does not fit; the weights stay as they were.
        """
        keep = call_arguments.checked_switch("keep_configured", keep_configured)
        read = read_chosen_loras(loras, self.config)
        self._turn.take(lambda: self.pipeline.set_loras(read, keep_configured=keep))

    def cache_statistics(self) -> dict[str, CacheStatistics]:
        """Hits, misses and sizes of the condition caches."""
        return self.pipeline.cache_statistics()

    def warmup(self) -> None:
        """Run one step at the default size, so that the first request finds kernels compiled and buffers allocated."""
        self.generate(prompt="", num_inference_steps=1, seed=1, enable_safety_checker=self._safety is not None)

    def close(self) -> None:
        """Let go of weights and files; waits for a running request. A second call does nothing."""
        self._turn.take(self._let_go)
        if self.device.type == "cuda":
            release_cached_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _opened(self, image: ImageSource, name: str, alpha: Alpha) -> Image:
        return open_image(call_arguments.checked_picture(name, image), limits=self._image_limits, name=name, alpha=alpha)

    def _let_go(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
            self._safety = None
