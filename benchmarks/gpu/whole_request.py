"""A whole request: full-size encoders and transformer with random weights, and the embedded model through the public engine."""

from __future__ import annotations

import time

import numpy as np
import torch
from PIL import Image

from benchmarks.compare.cases import PROMPT, SIZES, pictures
from benchmarks.compare.engine import EngineWay
from benchmarks.compare.evaluations import Evaluations
from benchmarks.compare.models import Models, png_file
from uso_engine import USOEngine
from uso_engine.imaging.pixels import to_pixels
from uso_engine.imaging.resize import resize_content

from .bench import Bench


def run(bench: Bench) -> None:
    bench.attempt("uso-tiny through the engine", lambda: embedded(bench))
    request = Request(bench)
    for turn in ("first", "second"):
        bench.attempt(f"{turn} request, s", request.run)
    request.close()
    stages = bench.results.get("second request, s")
    if isinstance(stages, dict):
        tokens, steps = request.size.tokens(request.case).all, request.size.steps_of(request.case)
        bench.record("gpu_request", {"tokens": tokens, "steps": steps, "seconds": stages})
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
    # "cuda" without a number, as most callers say it.
    for device in ("cpu", bench.device.type):
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


class Request:
    """The comparison's request of content and style through the public engine, on its models, resident on the device.

    Args:
        bench: says the size.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.size = SIZES["full" if bench.workload.is_full_size else "tiny"]
        self.case = self.size.core()[-1]
        self._models = Models(self.size, bench.device, bench.dtype)
        self._way = EngineWay(self._models, Evaluations(bench.device, "wall"), largest_difference=0.0)
        self._seed = 0

    def run(self) -> dict[str, float]:
        """Seconds of each encoder alone, then of the stages of a whole request, as the engine's answer has them, and of all."""
        self._seed += 1  # Another prompt and other pictures each time.
        models, bench = self._models, self._bench
        content, style = pictures(self.case, self._seed)
        assert content is not None and style is not None
        pixels = to_pixels(resize_content(content, long_side=self.size.content_side)).to(bench.device)
        seconds = {
            "T5 and CLIP alone": bench.seconds(lambda: models.text.encode(PROMPT)),
            "SigLIP and projector alone": bench.seconds(lambda: models.style.encode(style)),
            "content alone": bench.seconds(lambda: models.autoencoder.encode(pixels)),
        }
        start = time.perf_counter()
        result = self._way.generate(self.case, self._seed)
        files = bench.seconds(lambda: [png_file(image) for image in result.images])
        return {**seconds, **result.timings, "PNG": files, "whole request": time.perf_counter() - start}

    def close(self) -> None:
        """End the engine's threads."""
        self._way.close()
