"""What 8-bit attention loses beside what fewer steps lose: pictures of the trained small model, in two tiers.

    python -m benchmarks.tiers.attention [--cases 32]

Held-out triplets, one seed each; PSNR to the pictures of 28 steps in bf16 with exact attention, and to those of the same tier.
Another exact backend rounds in another order: what it loses nobody calls a loss, and nothing can be told apart below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.arguments import BenchmarkParser
from benchmarks.frontier.cases import encode, make
from benchmarks.frontier.judgement import BEST_PSNR_DB
from benchmarks.frontier.settings import Setting
from benchmarks.measure import write_record
from uso_engine.comparison.image_metrics import psnr
from uso_engine.config import load_config
from uso_engine.engine import USOEngine
from uso_engine.evaluation.evaluate import draw_held_out
from uso_engine.precision.tiers import TierName

CONFIG = "uso-tiny"
TIERS: tuple[TierName, ...] = ("bf16", "fp8")
WAYS = (("dense", 28), ("dense", 26), ("dense", 24), ("dense", 20), ("dense", 16), ("chunked", 28), ("8bit", 28), ("8bit", 24))
"""Attention backend and steps; the first is what the others of a tier are compared with."""


def losses(cases: int) -> Iterator[dict[str, object]]:
    """One record for each tier and way."""
    seeds, truth = range(100, 100 + cases), None
    for tier in TIERS:
        config = load_config(CONFIG)
        config = config.model_copy(update={"precision": config.precision.model_copy(update={"tier": tier})})
        with USOEngine.from_config(config, device="cpu") as engine:
            pipeline, base = engine.pipeline, None
            asked = encode(pipeline, draw_held_out(cases, 0))
            for attention, steps in WAYS:
                pipeline.transformer.attention_backend = attention
                pictures = make(pipeline, asked, Setting(steps), seeds).pictures
                base = pictures if base is None else base
                truth = base if truth is None else truth
                to_bf16, to_tier = (
                    [min(BEST_PSNR_DB, psnr(picture, other)) for picture, other in zip(pictures, others, strict=True)]
                    for others in (truth, base)
                )
                yield {
                    "config": CONFIG,
                    "tier": tier,
                    "attention": attention,
                    "steps": steps,
                    "cases": cases,
                    "to_bf16_db": sum(to_bf16) / cases,
                    "to_bf16_worst_db": min(to_bf16),
                    "to_tier_db": sum(to_tier) / cases,
                    "to_tier_worst_db": min(to_tier),
                }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "cases", "out", cases="32")
    options = parser.read(arguments)
    if options.cases < 2:
        parser.error(f"--cases {options.cases}: expected at least 2")
    torch.set_num_threads(1)
    for entry in losses(options.cases):
        print(entry, flush=True)
        write_record("lossy attention", entry, options.out)


if __name__ == "__main__":
    main()
