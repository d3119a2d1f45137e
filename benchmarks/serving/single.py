"""What a request by itself costs more through the loop's threads than stage by stage in one thread, and what deciding costs.

python -m benchmarks.serving.single
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.arguments import BenchmarkParser, side
from benchmarks.measure import interleave, write_record
from uso_engine import USOEngine
from uso_engine.api.research import ResearchOptions
from uso_engine.generation import Generation
from uso_engine.process_state import clean_process_state
from uso_engine.sampling.denoiser import Denoiser

FIELDS: dict[str, Any] = {"prompt": "a red fish", "seed": 7, "num_inference_steps": 28}


@clean_process_state()
def straight(engine: USOEngine, fields: dict[str, Any]) -> bytes:
    """The stages one after another in this thread, with no loop."""
    generation = Generation(engine.parts, engine.request_type(**fields), ResearchOptions())
    generation.open()
    generation.encode()
    denoiser = Denoiser(engine.pipeline.transformer)
    jobs = [denoiser.begin(image) for image in generation.admit()]
    for _ in range(generation.steps):
        denoiser.step(jobs)
    return generation.finish(jobs, ()).images[0].tobytes()


def shares(engine: USOEngine, fields: dict[str, Any]) -> dict[str, float]:
    """Of the processor time of steps: choosing who takes part, and forming a batch anew for each."""
    generations = [
        Generation(engine.parts, engine.request_type(**{**fields, "seed": i + 1}), ResearchOptions()) for i in range(4)
    ]
    denoiser, jobs = Denoiser(engine.pipeline.transformer), []
    for generation in generations:
        generation.open()
        generation.encode()
        jobs += [denoiser.begin(image) for image in generation.admit()]
    denoiser.step(jobs)
    times = {"step": 0.0, "form": 0.0}
    for _ in range(10):
        start = time.process_time()
        denoiser.step(jobs)
        times["step"] += time.process_time() - start
        start = time.process_time()
        denoiser.forget(jobs)
        denoiser.tables(jobs)
        times["form"] += time.process_time() - start
    return {"form": times["form"] / times["step"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "rounds", "out", rounds="10")
    parser.add_argument("--config", default="uso-tiny")
    parser.add_argument("--side", type=side, default=256, metavar="PIXELS", help="of a square picture; by default 256")
    options = parser.read(arguments)
    torch.set_num_threads(1)
    fields = {**FIELDS, "image_size": {"width": options.side, "height": options.side}}
    with USOEngine.from_config(options.config, device="cpu") as engine:
        if straight(engine, fields) != engine.generate(**fields).images[0].tobytes():
            raise SystemExit("the loop gives another image than the stages one after another")
        variants = {"straight": lambda: straight(engine, fields), "loop": lambda: engine.generate(**fields)}
        times = interleave(variants, rounds=options.rounds, device=engine.device, clock="process")
        ratio = times["loop"]["median_ms"] / times["straight"]["median_ms"]
        record = {"times": times, "ratio": ratio, "shares": shares(engine, fields), "side": options.side, "clock": "process"}
    write_record("serving_single", record, options.out)
    print(record)


if __name__ == "__main__":
    main()
