"""The tiers with 8-bit activations against bfloat16: one step of each, on the same weights."""

from __future__ import annotations

from benchmarks.tiers import steps as tier_steps

from .bench import RECORDS, Bench


def run(bench: Bench) -> None:
    for name in tier_steps.with_8_bit_activations():
        bench.attempt(name, lambda name=name: measured(bench, name))  # type: ignore[misc]
        bench.free()


def measured(bench: Bench, name: str) -> dict[str, object]:
    """A tier's and bfloat16's step, the difference of their velocities, and how many times faster it is."""
    (record,) = tier_steps.run(bench.workload, bench.device, bench.rounds, bench.out / RECORDS, only=(name,))
    return {key: record[key] for key in ("tier_ms", "bf16_ms", "times_bf16", "difference")}
