"""The documents' tables of what the GPU campaigns measured."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest
from benchmarks.step.prediction import predicted_step_ms, text_beside
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Tokens

from .variants import BESIDE


def spread(timing: Record) -> str:
    return f"{timing['p20_ms']:.1f} to {timing['p80_ms']:.1f}"


def step_variants(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}",
            r["variant"],
            f"{r['median_ms']:.1f}",
            spread(r),
            f"{r['tflops']:.0f}",
            f"{r['difference']:.1e}",
            r["hash"],
        ]
        for r in latest(records, "workload", "variant")
    ]
    return markdown(["machine", "workload", "variant", "ms (median)", "p20 to p80", "TFLOP/s", "difference", "hash"], rows)


def kernel_classes(records: list[Record]) -> str:
    """Predicted for an H100, beside every machine's measurement."""
    params, tokens = TransformerParams(), Tokens(style=192, content=1024)
    predicted = predicted_step_ms(params, tokens)
    measured = [r for r in latest(records, "workload") if r["tokens"] == tokens.all]
    rows = []
    for name in {**predicted, **{name: 0 for r in measured for name in r["classes"]}}:
        classes = [r["classes"].get(name) for r in measured]
        cells = [measured_class(found) for found in classes] if measured else ["pending"]
        rows.append([name, f"{predicted[name]:.1f}" if name in predicted else "", *cells])
    sums = [f"{sum(found['ms'] for found in r['classes'].values()):.1f}" for r in measured] or ["pending"]
    rows.append(["all", f"{sum(predicted.values()):.0f}", *sums])
    header = ["kernels, L = 5824, bf16", "predicted for an H100, ms a step"]
    return markdown([*header, *([f"{hardware(r)}, ms (floor; launches)" for r in measured] or ["measured"])], rows)


def measured_class(found: Record | None) -> str:
    return "" if found is None else f"{found['ms']:.1f} ({found['floor_ms']:.1f}; {found['launches']:.0f})"


def rates(records: list[Record]) -> str:
    rows: list[list[str]] = []
    for r in latest(records, "workload"):
        ceilings = r["ceilings"] if isinstance(r["ceilings"], dict) else {}
        rows += [[hardware(r), name, "", plain(value)] for name, value in ceilings.items()]
        for group in ("products, TFLOP/s", "attention, TFLOP/s"):
            for name, ways in r[group].items() if isinstance(r[group], dict) else ():
                entries = ways.items() if isinstance(ways, dict) else [("", ways)]
                rows += [[hardware(r), name, way, plain(value)] for way, value in entries if isinstance(value, float)]
    return markdown(["machine", "what", "how", "rate"], rows)


def plain(value: object) -> str:
    """Three digits that count of a rate; what was wrong where there is none."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def requests(records: list[Record]) -> str:
    rows = [
        [hardware(r), stage, f"{1e3 * seconds:.0f}"]
        for r in latest(records, "workload")
        for stage, seconds in r["seconds"].items()
    ]
    return markdown(["machine", "stage", "ms"], rows)


def variants(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{16 * r['grid'][1]} x {16 * r['grid'][0]}",
            r["variant"],
            f"{r['median_ms']:.1f}",
            spread(r),
            f"{r['difference']:.1e}",
            r["hash"],
        ]
        for r in latest(records, "workload", "grid", "variant")
    ]
    return markdown(["machine", "picture", "variant", "ms (median)", "p20 to p80", "difference", "hash"], rows)


def beside(records: list[Record]) -> str:
    """The text stream's products beside the image stream's: predicted for an H100, and what machines have measured."""
    params, bases, rows = TransformerParams(), latest([r for r in records if r["variant"] == "base"], "tokens"), []
    medians = {
        (hardware(r), r["tokens"]): r["median_ms"] for r in latest(records, "tokens", "variant") if r["variant"] == BESIDE
    }
    for tokens in (Tokens(), Tokens(content=1024), Tokens(style=192, content=1024)):
        predicted, measured = text_beside(params, tokens), []
        for base in bases:
            median = medians.get((hardware(base), base["tokens"]))
            if base["tokens"] == tokens.all:
                saved = "not timed" if median is None else f"{base['median_ms'] - median:.1f} of {base['median_ms']:.1f}"
                measured.append(f"{hardware(base)}: {saved}")
        numbers = (predicted.products, predicted.idle, predicted.waits, predicted.saved)
        name = f"L = {tokens.all}, {tokens.text + tokens.style} of text"
        rows.append([name, *(f"{number:.1f}" for number in numbers), ", ".join(measured) or "pending"])
    header = ["1024 x 1024, bf16", "text's products alone", "without a tile", "waits", "predicted saving", "measured"]
    return markdown([f"{header[0]}, ms a step", *header[1:]], rows)


def company(records: list[Record]) -> str:
    columns = ("again", "twice", "beside a small one")
    rows = [[hardware(r), r["backend"], *(r[name] for name in columns)] for r in latest(records, "workload", "backend")]
    return markdown(["machine", "attention", "alone again", "with another of its size", "with a smaller one"], rows)


def together(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            r["way"],
            f"{r['steps']}",
            f"{r['tokens']}",
            f"{r['median_ms']:.1f}",
            spread(r),
            f"{r['tokens_per_s']:.0f}",
            f"{100 * r['share']:.0f} %",
        ]
        for r in latest(records, "workload", "way")
    ]
    header = ["machine", "requests", "steps", "tokens", "ms (median)", "p20 to p80", "tokens/s", "of the single request's"]
    return markdown(header, rows)


def host_time(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{16 * r['grid'][1]} x {16 * r['grid'][0]}",
            r["way"],
            *(f"{r[name]:.1f}" for name in ("queued_ms", "least_queued_ms", "finished_ms")),
        ]
        for r in latest(records, "workload", "grid", "way")
    ]
    return markdown(["machine", "picture", "step", "queued after, ms", "at the least, ms", "finished after, ms"], rows)


def memory(records: list[Record]) -> str:
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}",
            f"{r['first_step_s']:.1f}",
            f"{r['second_step_s']:.2f}",
            f"{r['peak_gib']:.2f}",
            f"{r['formula_gib']:.2f}",
        ]
        for r in latest(records, "workload")
        if "peak_gib" in r
    ]
    return markdown(["machine", "workload", "first step, s", "second step, s", "peak, GiB", "formula, GiB"], rows)


TABLES = tuple(
    Table("docs/performance.md", marker, benchmarks, make)
    for marker, benchmarks, make in (
        ("gpu steps", ("gpu_step",), step_variants),
        ("gpu classes", ("gpu_profile",), kernel_classes),
        ("gpu rates", ("rates",), rates),
        ("gpu request", ("gpu_request",), requests),
        ("gpu variants", ("gpu_variant",), variants),
        ("gpu beside", ("gpu_variant",), beside),
        ("gpu company", ("gpu_company",), company),
        ("gpu together", ("gpu_together",), together),
        ("gpu host time", ("gpu_host_time",), host_time),
        ("gpu memory", ("cold_start",), memory),
    )
)
