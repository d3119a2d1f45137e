"""Calling a step callback as diffusers' pipelines call theirs: ``callback(pipe, index, timestep, {"latents": …})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from .messages import shown

if TYPE_CHECKING:
    from torch import Tensor

    from uso_engine.sampling.step import OnStep, Step

_TIMESTEPS = 1000
_TENSORS = ("latents",)
Callback: TypeAlias = Callable[["RunningPipeline", int, "Tensor", dict[str, object]], object]


class RunningPipeline:
    """What stands in a callback for the pipeline: setting ``_interrupt`` ends the run after the step, its latents as they are.

    Args:
        num_timesteps: steps of the run.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether the run was told to end."""
        return self._interrupt


def step_callback(callback: object, tensor_inputs: object) -> OnStep | None:
    """What the engine is to call after each step for a callback of diffusers.

    Args:
        callback: called with the pipeline, the step's index, its timestep (1000 * sigma, a tensor), and the tensors: the packed
            latents [n, L, 64] of all images. What it returns under "latents" is taken over: one tensor, or one for each image.
        tensor_inputs: names of the tensors that it wants; None for all there are.

    Raises:
        ValueError: no callback, or tensors that do not exist here.
    """
    names = list(tensor_inputs) if isinstance(tensor_inputs, (list, tuple)) else tensor_inputs
    if names is not None and (not isinstance(names, list) or any(name not in _TENSORS for name in names)):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of {', '.join(_TENSORS)}, got {shown(tensor_inputs)}"
        )
    if callback is None:
        return None
    if not callable(callback):
        raise ValueError(f"callback_on_step_end must be callable, got {type(callback).__name__}")
    function: Callback = callback
    wanted = _TENSORS if names is None else names
    pipelines: list[RunningPipeline] = []

    def on_step(step: Step) -> None:
        import torch

        if step.index == 0:
            pipelines[:] = [RunningPipeline(step.steps)]
        latents = torch.stack(step.latents)
        given: dict[str, object] = {"latents": latents} if "latents" in wanted else {}
        answer = function(pipelines[0], step.index, torch.tensor(_TIMESTEPS * step.sigmas[0]), given)
        # Written to in place, they count too, as in a pipeline whose latents these are.
        step.latents = tuple(latents)
        if isinstance(answer, Mapping) and "latents" in answer:
            step.latents = _per_image(answer["latents"])
        if pipelines[0]._interrupt:
            step.stop()

    return on_step


def _per_image(latents: object) -> tuple[Tensor, ...]:
    """Latents of each image; what is none the denoiser refuses, as it does for `on_step`."""
    import torch

    if isinstance(latents, torch.Tensor) and latents.ndim == 3:
        return tuple(latents)
    return tuple(latents) if isinstance(latents, Sequence) else latents  # type: ignore[return-value]
