"""The engine: a configuration, loaded; requests in, pictures out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from . import call_arguments, generation
from .api.fields import checked_switch
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .api.result import GenerationResult
from .api.statistics import EngineStatistics
from .conditioning.cache_statistics import CacheStatistics
from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .config import EngineConfig, load_config
from .diffusers_face import DiffusersFace
from .errors import EngineClosedError
from .generation import LoadedParts
from .imaging.open import Alpha, ImageLimits, ImageSource, open_image
from .imaging.pixels import to_pixels
from .imaging.resize import resize_content
from .loading.assembly import load_parts
from .loading.device import check_device, default_device
from .loading.lora_choice import LoRAChoice, choose_loras
from .loading.transformer import LoadProgress
from .offload.budget import find_budget
from .offload.placement import release_cached_memory
from .pipeline import Pipeline
from .precision.transformer import TIER_OF_DTYPE
from .preparation import prepare
from .process_bound import ProcessBound
from .process_state import clean_process_state
from .progress import StepProgress
from .provenance import log_warnings
from .request_type import request_type_of
from .sampling.step import OnStep, Step
from .sampling.step_graphs import why_no_graphs
from .sampling_settings import QualityName
from .scheduling.assembly import make_loop, statistics_of
from .scheduling.waiting import refuse_inside_on_step, wait_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from .offload.plan import MemoryPlan
    from .safety.checker import SafetyChecker


class USOEngine(ProcessBound, DiffusersFace):
    """A loaded model. Made with `from_config`; usable in a ``with`` statement, which closes it: another is refused then.

    Any thread may call it: requests that are there at once take their denoising steps in turn or together, by the policy of
    `uso_engine.scheduling.scheduler`, and each gets the images that it would get alone. Threads of the engine's own compute.

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
        self.request_type = request_type_of(config)
        parts = LoadedParts(config, pipeline, safety, device, image_limits if image_limits is not None else ImageLimits())
        self._parts: LoadedParts | None = parts
        self.loop = make_loop(parts)
        """The threads that take requests through their stages; `AsyncUSOEngine` uses the same."""
        # The threads hold the weights; an engine that nobody has any more ends them.
        weakref.finalize(self, self.loop.stop).atexit = False

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
        """Load an engine. Where that fails nothing is left of it, and it may be tried again.

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
            ConfigError, CheckpointError: a configuration that cannot be used, or weights that do not fit.
            BackendError, ParallelError: this machine cannot run what was asked for, or a process did not come.
            MemoryBudgetError, DeviceMemoryError: the budget is too small, or memory ran out; says for what, and who holds it.
            ValueError: another dtype, a budget that is not positive, or an argument of another type.
        """
        call_arguments.check_loading(config, device, dtype, attention, image_limits, progress)
        config = config if isinstance(config, EngineConfig) else load_config(config)
        request_type_of(config)  # Like what is looked for below, it may refuse: before minutes of loading.
        runs_on = check_device(default_device() if device is None else device)
        tier = None if dtype is None else TIER_OF_DTYPE[dtype]
        asked = config.memory_budget_gib if memory_budget_gib is None else memory_budget_gib
        budget = find_budget(config, config.precision.tier if tier is None else tier, runs_on, asked)
        why_no_graphs(config.cuda_graphs, runs_on, has_plan=budget is not None, is_shared=config.parallel.ulysses > 1)
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
        return self.parts.pipeline

    @property
    def parts(self) -> LoadedParts:
        """What requests are made with.

        Raises:
            EngineClosedError: the engine was closed.
        """
        if self._parts is None:
            raise EngineClosedError(f"engine {self.config.name} was closed; make a new one with USOEngine.from_config")
        return self._parts

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
        """Make the images of a request; waits for them. An interrupt (Ctrl-C) cancels it at its next step.

        Args:
            request: what to make, or its prompt; or give its fields as keywords: ``prompt="…", images=[…], seed=7``.
            on_step: called in this thread after each denoising step, while other requests go on; may look, change the latents,
                stop, or cancel by raising.
            research: additions that no request schema offers.
            progress: show a bar over the steps on standard error.
            priority: from -10 to 10; of requests that are there at once higher ones go first, but keep no other from its share.
            timeout_s: seconds until it has to be done, where that is less than ``queue.max_request_s`` of the configuration.
            quality: "high", "fast" or "draft", measured points with less work; "reference" changes nothing.
            fields: of `GenerationRequest`.

        Returns:
            The images and what they cost.

        Raises:
            ValueError: a request outside the schema or this engine's limits, or another type; names field, limit and value.
            ImageError, FetchError, MissingFileError: an input image that cannot be used.
            SafetyError: the safety checker was asked for and could not run; the images are withheld.
            MemoryBudgetError, DeviceMemoryError: it needs more than the memory that was set as a budget, or that there is.
            QueueFullError: other threads have as many requests here as ``[queue]`` allows.
            RequestTimeoutError: it was not done, or not begun, in the time it had.
            EngineClosedError: the engine was closed.
            EngineDeadError: the thread that computes has failed; the cause says why.
        """
        refuse_inside_on_step()
        generation = prepare(self.parts, self.request_type, request, fields, research, quality)
        on_step = call_arguments.checked_on_step(on_step)
        priority, timeout_s = call_arguments.checked_scheduling(priority, timeout_s)
        bar = StepProgress() if checked_switch("progress", progress) else None
        with nullcontext() if bar is None else bar:
            shown = on_step if bar is None else bar.beside(on_step)
            return wait_for(self.loop, generation, on_step=shown, priority=priority, timeout_s=timeout_s)

    def encode_prompt(self, prompt: str) -> TextEmbedding:
        """Embed a prompt, to be saved or passed in later."""
        refuse_inside_on_step()
        text = call_arguments.checked_prompt(prompt)
        made = self.loop.call(self.loop.conditioning, partial(self.pipeline.encode_prompt, text))
        log_warnings(made.warnings())
        return made

    def encode_style(self, image: ImageSource, *, alpha: Alpha = "white") -> StyleTokens:
        """Turn a style image into tokens, to be saved or passed in later; ``alpha`` as in `ResearchOptions`."""
        pixels = self.pipeline.style.preprocess(self._opened(image, "style image", alpha))
        return self.loop.call(self.loop.conditioning, partial(self.pipeline.encode_style, pixels))

    def encode_content(self, image: ImageSource, *, alpha: Alpha = "white") -> torch.Tensor:
        """Turn a content image into its latent [16, h / 8, w / 8]; ``alpha`` as in `ResearchOptions`."""
        picture = self._opened(image, "content image", alpha)
        pixels = to_pixels(resize_content(picture, long_side=self.config.content.long_side))
        return self.loop.call(self.loop.conditioning, partial(self.pipeline.encode_content, pixels))

    def preview(self, step: Step, image: int = 0) -> Image:
        """Show where a run is heading, cheaply; from ``on_step`` or later. Memory plans do not count it.

        Args:
            step: what ``on_step`` was given.
            image: which image.

        Returns:
            A small picture.
        """
        latent = call_arguments.shown_latent(step, image)
        return self.loop.call(self.loop.decoding, partial(generation.preview, self.pipeline, latent))

    def set_loras(self, loras: Sequence[LoRAChoice], *, keep_configured: bool = True) -> None:
        """Merge LoRAs into the weights, from the pristine ones; a second call replaces the first.

        Requests that have begun end first, with the LoRAs that they began with; those that come later get the new ones.

        Args:
            loras: paths (from the working directory) or hub ids, each alone or with its weight; an empty list takes all away.
            keep_configured: whether the configuration's LoRAs, USO's own among them, stay.

        Raises:
            ValueError: no such list, a weight that is no finite number, or a switch that is neither True nor False.
            MissingFileError: a file is not there.
            LoRAError: a file that does not fit; the weights stay as they were.
        """
        keep = checked_switch("keep_configured", keep_configured)
        refuse_inside_on_step()
        self.loop.change_loras(choose_loras(loras, self.config, keep_configured=keep))

    def cache_statistics(self) -> dict[str, CacheStatistics]:
        """Hits, misses and sizes of the condition caches."""
        return self.pipeline.cache_statistics()

    def statistics(self) -> EngineStatistics:
        """What is waiting and running, and what was done since the engine was loaded."""
        return statistics_of(self.loop, self.parts)

    def trace(self, path: str | Path) -> AbstractContextManager[None]:
        """Write what the engine's threads do within a ``with`` statement to a file in Chrome's trace format.

        Args:
            path: a .json file for chrome://tracing or Perfetto. On a GPU stretches end when the work is handed over.

        Raises:
            ValueError, OutputError: no path, or it cannot be written.
        """
        return self.loop.traced(path)

    def warmup(self) -> None:
        """Run one step at the default size, so that the first request finds kernels compiled and buffers allocated."""
        # One step is too few for a sampler that remembers; what it would add needs no compiling.
        safe, research = self.parts.safety is not None, ResearchOptions(sampler="euler")
        self.generate(prompt="", num_inference_steps=1, seed=1, enable_safety_checker=safe, research=research)

    def close(self) -> None:
        """Let go of weights and files; waits for requests that have begun, fails the others. A second call does nothing."""
        refuse_inside_on_step()
        self.loop.close()
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.pipeline.close()
        if self.device.type == "cuda":
            release_cached_memory()

    def __enter__(self) -> Self:
        _ = self.parts  # An error where the engine was closed.
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _opened(self, image: ImageSource, name: str, alpha: Alpha) -> Image:
        return open_image(call_arguments.checked_picture(name, image), limits=self.parts.image_limits, name=name, alpha=alpha)
