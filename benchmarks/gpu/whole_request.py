"""A whole request: full-size encoders and transformer with random weights, and the embedded model through the public engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from benchmarks.encoders import autoencoder_module, encoder_sizes, filled, text_modules, vision_module
from benchmarks.workload import conditions, random_inputs, random_transformer
from uso_engine import USOEngine
from uso_engine.conditioning.content import Autoencoder
from uso_engine.imaging.pixels import from_pixels
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule

from .bench import Bench

Result = TypeVar("Result")


def run(bench: Bench) -> None:
    bench.attempt("uso-tiny through the engine", lambda: embedded(bench))
    request = Request(bench)
    for turn in ("first", "second"):
        bench.attempt(f"{turn} request, s", request.run)
    stages = bench.results.get("second request, s")
    if isinstance(stages, dict):
        bench.record("gpu_request", {"tokens": bench.tokens.all, "steps": bench.workload.steps, "seconds": stages})
    if bench.on_gpu:
        bench.save("peak, GiB", torch.cuda.max_memory_allocated(bench.device) / 2**30)


def embedded(bench: Bench) -> dict[str, object]:
    """The picture of the embedded model on this device against the CPU's, in 8-bit steps, and the seconds of a second request.

    Raises:
        ValueError: they are not the same picture.
    """
    content = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    style = Image.radial_gradient("L").convert("RGB").resize((80, 80))
    pictures, seconds = [], 0.0
    for device in ("cpu", str(bench.device)):
        with USOEngine.from_config("uso-tiny", device=device, dtype=torch.float32) as engine:
            for _ in range(2):
                start = time.perf_counter()
                result = engine.generate(prompt="a fish", images=[content, style], seed=5, num_inference_steps=4)
                seconds = time.perf_counter() - start
            pictures.append(np.asarray(result.images[0], dtype=int))
    difference = int(np.abs(pictures[0] - pictures[1]).max())
    if difference > 2:
        raise ValueError(f"the CPU's picture and the device's differ by {difference} of 255")
    return {"largest difference of 255": difference, "second request, s": seconds}


@dataclass
class Request:
    """Everything that a request of full size needs, resident on the device."""

    bench: Bench
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bench = self.bench
        workload, device = bench.workload, bench.device
        self.t5, self.clip = (filled(module, device, bench.dtype) for module in text_modules(encoder_sizes(workload)))
        self.vision = filled(vision_module(encoder_sizes(workload)), device, torch.float32)
        autoencoder = filled(autoencoder_module(encoder_sizes(workload)), device, torch.float32)
        decode_dtype = bench.dtype if bench.on_gpu else torch.float32
        self.autoencoder = Autoencoder(
            autoencoder, scale_factor=0.3611, shift_factor=0.1159, device=device, decode_dtype=decode_dtype
        )
        self.transformer = random_transformer(workload.params, device, bench.dtype)
        self.inputs = random_inputs(workload, device, bench.dtype)
        side = 384 if workload.is_full_size else 56
        self.style = torch.randn(1, 3, side, side, device=device)
        self.content = torch.rand(1, 3, 16 * workload.content[0], 16 * workload.content[1], device=device) * 2 - 1
        self.t5_ids = torch.randint(0, 99, (1, workload.text), device=device)
        self.clip_ids = torch.randint(0, 99, (1, 77), device=device)

    def run(self) -> dict[str, float]:
        """Seconds of every stage, one after another, and their sum."""
        self.seconds = {}
        rows, columns = self.inputs.grid
        sigmas = schedule(self.bench.workload.steps, 16 * columns, 16 * rows)
        self.stage("T5", lambda: self.t5(self.t5_ids))
        self.stage("CLIP", lambda: self.clip(self.clip_ids))
        self.stage("SigLIP", lambda: self.vision(self.style, output_hidden_states=True))
        self.stage("encode content", lambda: self.autoencoder.encode(self.content))
        sequence = self.stage(
            "admit", lambda: admit(self.transformer, conditions(self.inputs), self.inputs.grid, sigmas, self.inputs.guidance)
        )
        noise = torch.randn(16, 2 * rows, 2 * columns)
        denoiser = DenoisingRun(self.transformer, [ImageJob(sequence, noise, tuple(sigmas))])
        self.stage(f"{len(sigmas) - 1} steps", denoiser.run)
        latent = denoiser.latents()[0]
        pixels = self.stage("decode", lambda: self.autoencoder.decode(latent[None]))
        # What random weights make need not be finite.
        pixels = pixels.nan_to_num()
        self.stage("to bytes", lambda: from_pixels(pixels))
        return {**self.seconds, "sum": sum(self.seconds.values())}

    def stage(self, name: str, make: Callable[[], Result]) -> Result:
        """Run a stage and keep its seconds."""
        found: list[Result] = []
        self.seconds[name] = self.bench.seconds(lambda: found.append(make()))
        return found[0]
