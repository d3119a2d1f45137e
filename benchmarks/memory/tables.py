"""Tables of memory: plans as computed and as carried out, quantising on the host, decoding in strips."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest
from uso_engine.config import load_config
from uso_engine.offload.budget import public_sizes
from uso_engine.offload.phases import GIB, PCIE_BYTES_PER_S
from uso_engine.offload.plan import plan_memory

from .plans import TIER_CONFIGS

BUDGETS_GIB = (24, 16, 12, 8)


def plans(records: list[Record]) -> str:
    """Memory plans of every tier for the usual cards; computed."""
    rows = []
    for name in TIER_CONFIGS:
        config = load_config(name)
        sizes = public_sizes(config, config.precision.tier)
        for budget in BUDGETS_GIB:
            plan = plan_memory(budget * GIB, sizes)
            blocks = len(plan.streamed_double_blocks) + len(plan.streamed_single_blocks)
            rows.append([
                f"{config.precision.tier}, T5 {config.precision.text_encoder}",
                f"{budget} GiB",
                f"{plan.peak_bytes / GIB:.1f} GiB" if plan.fits else "; ".join(plan.problems),
                ", ".join(plan.streamed) or "nothing",
                str(blocks) if blocks else "none",
                plan.decoding,
                f"{plan.moved_bytes / 1e9:.1f} GB, {plan.transfer_s:.1f} s",
            ])  # fmt: skip
    header = ["tier", "budget", "peak", "streamed once", "blocks streamed per step", "decoding",
              f"moved per request, at {PCIE_BYTES_PER_S / 1e9:.0f} GB/s"]  # fmt: skip
    return markdown(header, rows)


def carried_out(records: list[Record]) -> str:
    """Plans carried out on a GPU under a cap of their budget."""
    rows = [
        [
            hardware(r),
            f"{r['tier']}, T5 {r['text_encoder']}",
            f"{r['budget_gib']:g} GiB",
            f"{r['planned_peak_gib']:.2f} / {r['peak_gib']:.2f}",
            f"{r['blocks']}",
            f"{r['moved_gb']:.1f}",
            f"{r['seconds']:.1f}",
        ]
        for r in latest(records, "workload", "tier", "text_encoder", "budget_gib")
        if r["peak_gib"] is not None
    ]
    header = [
        "machine",
        "tier",
        "budget",
        "planned / measured peak, GiB",
        "blocks streamed",
        "moved, GB",
        "seconds",
    ]
    return markdown(header, rows)


def quantising(records: list[Record]) -> str:
    """Peak host memory while quantising into a file."""
    rows = [
        [
            r["tier"],
            f"{r['checkpoint_bytes'] / 1e9:.2f}",
            f"{r['result_bytes'] / 1e9:.2f}",
            f"{r['peak_above_start_bytes'] / GIB:.2f} GiB",
        ]
        for r in latest(records, "tier", by_machine=False)
    ]
    return markdown(["tier", "checkpoint, GB", "result, GB", "peak memory above start"], rows)


def decoding(records: list[Record]) -> str:
    """Decoding whole and in strips."""
    rows = [
        [
            hardware(r),
            f"{r['side']}",
            r["cut"],
            f"{r['median_ms'] / 1e3:.2f} ({r['clock']})",
            f"{r['difference']:.1e}",
            f"{r['planned_mib']:.0f} / {'-' if r['peak_mib'] is None else format(r['peak_mib'], '.0f')}",
            f"{r['moved_gb']:.1f}",
        ]
        for r in latest(records, "device", "side", "cut")
    ]
    header = ["machine", "side", "decoding", "seconds (clock)", "difference", "planned / measured peak, MiB", "moved, GB"]
    return markdown(header, rows)


TABLES = (
    Table("docs/quantization.md", "plans", (), plans),
    Table("docs/quantization.md", "plans carried out", ("memory_plan",), carried_out),
    Table("docs/quantization.md", "quantising", ("quantising memory",), quantising),
    Table("docs/quantization.md", "decoding", ("decoding in strips",), decoding),
)
