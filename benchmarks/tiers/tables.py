"""Tables of precision tiers: errors of whole answers, of single products and by group of layers; a step's time."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, clock_note, hardware, latest
from uso_engine.precision.tiers import ANY_GPU, TIERS


def steps(records: list[Record]) -> str:
    """A step of every tier beside bf16's, on every machine."""
    rows = [
        [
            hardware(r),
            r["workload"],
            r["tier"],
            f"{r['tier_ms']['median_ms']:.0f}",
            f"{r['bf16_ms']['median_ms']:.0f}",
            f"{r['times_bf16']:.2f}",
            percent(r["difference"], 1),
            f"{r['resident_gb']:.2f}",
        ]
        for r in latest(records, "workload", "tier")
    ]
    header = ["machine", "workload", "tier", "step, ms", "bf16, ms", "times bf16", "velocity differs", "without modulation, GB"]
    return markdown(header, rows) + clock_note(records)


def rules(records: list[Record]) -> str:
    """What becomes of a matrix in each tier, and what computes it; from the table of tiers."""
    rows = [
        [
            f"`{name}`",
            *(tier.dtype if chosen == "float" else chosen for chosen in (tier.blocks, tier.sensitive, tier.modulation)),
            "any GPU, or a CPU" if tier.oldest_gpu == ANY_GPU else f"{tier.oldest_gpu.name} or newer, or a CPU",
            f"{percent(tier.velocity_bound, 1)} / {percent(tier.latent_bound, 1)}",
        ]
        for name, tier in TIERS.items()
        if not tier.is_exact
    ]
    header = ["tier", "blocks", "sensitive layers (`keep`)", "modulation linears", "needs"]
    return markdown([*header, "`verify` allows: first velocity / last latent"], rows)


def errors(records: list[Record]) -> str:
    """Errors and sizes of each tier."""
    rows = [
        [
            r["tier"],
            *(f"{percent(r[f'{name}_mean'])} / {percent(r[f'{name}_max'])}" for name in ("velocity", "latent")),
            f"{r['resident_bytes'] / 1e9:.2f}",
            f"{r['modulation_bytes'] / 1e9:.2f}",
        ]
        for r in latest(records, "tier", by_machine=False)
    ]
    header = ["tier", "first velocity, mean / worst", "last latent, mean / worst", "transformer, GB", "modulation linears, GB"]
    return markdown(header, rows)


def products(records: list[Record]) -> str:
    """Errors of single products: a row per kind, a column per width and input."""
    found = latest(records, "kind", "width", "input", by_machine=False)
    cases = list(dict.fromkeys((r["width"], r["input"]) for r in found))
    kinds = list(dict.fromkeys(r["kind"] for r in found))
    cells = {(r["kind"], r["width"], r["input"]): percent(r["error"]) for r in found}
    rows = [[kind, *(cells[kind, width, name] for width, name in cases)] for kind in kinds]
    return markdown(["weights and activations", *(f"K = {width}, {name}" for width, name in cases)], rows)


def sensitivity(records: list[Record]) -> str:
    """Groups of layers, the most sensitive per parameter first."""
    found = latest(records, "model", "kind", "group", by_machine=False)
    rows = [
        [r["model"], r["group"], r["kind"], percent(r["share"], 1), percent(r["latent_error"]), percent(r["per_share"])]
        for r in sorted(found, key=lambda r: (r["model"], -r["per_share"]))
    ]
    return markdown(
        ["model", "layers, all others in float32", "kind", "share of parameters", "last latent", "per √share"], rows
    )


def lossy_attention(records: list[Record]) -> str:
    """PSNR of 8-bit attention beside that of fewer steps."""
    rows = [
        [
            r["tier"],
            f"{r['steps']} steps, {r['attention']}",
            *(f"{r[f'to_{base}_db']:.1f} / {r[f'to_{base}_worst_db']:.1f}" for base in ("bf16", "tier")),
        ]
        for r in latest(records, "tier", "attention", "steps", by_machine=False)
    ]
    return markdown(["tier", "pictures", "PSNR to bf16, dB: mean / worst", "PSNR to the same tier's 28 steps"], rows)


def percent(value: float, digits: int = 2) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.{digits}f} %"


TABLES = (
    Table("docs/performance.md", "tiers", ("tier_steps",), steps),
    Table("docs/quantization.md", "rules", (), rules),
    Table("docs/quantization.md", "tiers", ("tier error",), errors),
    Table("docs/quantization.md", "lossy attention", ("lossy attention",), lossy_attention),
    Table("docs/quantization.md", "products", ("quantised product",), products),
    Table("docs/quantization.md", "sensitivity", ("sensitivity",), sensitivity),
)
