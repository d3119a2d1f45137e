"""Tables of whole requests, of first requests and of what was not compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, clock_note, hardware, latest
from benchmarks.turns import is_steady

from .steadiness import left_out

LEAST_CLAIM = 0.015
"""A difference of less is none: so much two runs of the same thing differ."""
_AUTHORS = ("authors' way", "authors' code")
TARGETS = (*((way, 2.5, ("bfloat16",)) for way in _AUTHORS), ("diffusers", 1.0, ("bfloat16", "float32")))
"""How many times ours each is to take, and in which types that is aimed at."""
NO_GPU = "GPU numbers are pending: no record of a GPU is here yet."


def ratio(value: float) -> str:
    """How many times ours another way takes; nothing is claimed within `LEAST_CLAIM`."""
    return "the same" if abs(value - 1) < LEAST_CLAIM else f"{value:.2f} times"


def current(records: list[Record]) -> list[Record]:
    """The last record of every case and way of a steady machine; cases in order of pictures and tokens, the engine first."""
    found = latest(list(filter(is_steady, records)), "size", "dtype", "case", "way")
    first = [*dict.fromkeys((hardware(r), r["size"], r["dtype"]) for r in found)]

    def place(record: Record) -> tuple[object, ...]:
        run = first.index((hardware(record), record["size"], record["dtype"]))
        return run, record["images"], -record["steps"], record["tokens"], record["case"]

    return sorted(found, key=place)


def runs(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by hardware, size and type."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((hardware(record), record["size"], record["dtype"]), []).append(record)
    return found


def ways_of(records: Sequence[Record]) -> list[str]:
    """Every way, the engine's first."""
    return sorted(dict.fromkeys(record["way"] for record in records), key=lambda way: not way.startswith("ours"))


def notes(records: Sequence[Record]) -> str:
    """Command, versions, driver and commit of every run."""
    lines = []
    for (machine, size, dtype), found in runs(records).items():
        for command in dict.fromkeys(record["command"] for record in found):
            last = [record for record in found if record["command"] == command][-1]
            versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
            state = f", {last['machine']['gpu_state']}" if "gpu_state" in last["machine"] else ""
            commit, taken = last["machine"]["commit"], last["machine"]["taken"][:10]
            lines.append(f"{machine}, {size}, {dtype}: `{command}` ({versions}{state}; commit {commit}, {taken}).")
    if lines:
        lines.append("One row: the same command with `--cases CASE --ways WAY --again`.")
    return "".join(f"\n\n{line}" for line in lines)


def pending(records: Sequence[Record]) -> str:
    """That no record is a GPU's; empty where one is, though tables may leave it out."""
    is_there = any("gpu" in record["machine"] and record["device"] == "cuda" for record in records)
    return "" if is_there else f"\n\n{NO_GPU}"


def overview(records: list[Record]) -> str:
    """One row for every case: the engine's time, and how many times as long each peer takes."""
    everything, records = records, current(records)
    peers = [way for way in ways_of(records) if not way.startswith("ours")]
    rows = []
    for (machine, size, dtype), found in runs(records).items():
        for case in dict.fromkeys(record["case"] for record in found):
            by_way = {record["way"]: record for record in found if record["case"] == case}
            ours = ours_of(found, next(iter(by_way.values())))
            cells = [ratio(by_way[way]["times_ours"]) if way in by_way else "" for way in peers]
            times = [f"{ours['image_s']:.2f}", f"{ours['step_ms']['median_ms']:.0f}", f"{100 * ours['of_floor']:.0f} %"]
            rows.append([f"{machine}, {size}, {dtype}", f"{case}, L = {ours['tokens']}", *times, *cells])
    header = ["machine, size, type", "request", "ours, s an image", "ms a step", "of the floor", *peers]
    ending = targets(records) + clock_note(records) + left_out(everything, records) + notes(records)
    return markdown(header, rows) + ending + pending(everything)


def targets(records: Sequence[Record]) -> str:
    """Whether the least ratio of every run reaches what was aimed at."""
    lines = []
    for (machine, size, dtype), found in runs(records).items():
        for way, aim, dtypes in TARGETS:
            theirs = [record for record in found if record["way"] == way]
            if not theirs or dtype not in dtypes:
                continue
            least = min(record["times_ours"] for record in theirs)
            line = f"- {machine}, {size}, {dtype}: {way} takes at least {least:.2f} times ours; {aim:g} is "
            bounds = [bound(record, ours_of(found, record)) for record in theirs]
            short = sum(most < aim for most in bounds)
            if least >= aim - LEAST_CLAIM:
                lines.append(f"{line}reached.")
                continue
            verdict = (
                "out of reach"
                if short == len(bounds)
                else f"out of reach in {short} of {len(bounds)} requests"
                if short
                else "missed"
            )
            lines.append(f"{line}{verdict}: at the floor it would take {min(bounds):.2f} to {max(bounds):.2f} times ours.")
    return "\n\n" + "\n".join(lines) if lines else ""


def ours_of(records: Sequence[Record], theirs: Record) -> Record:
    """The engine's record of another way's case."""
    return next(record for record in records if record["case"] == theirs["case"] and record["way"].startswith("ours"))


def bound(theirs: Record, ours: Record) -> float:
    """How many times ours a way would take if our steps were at the floor and the rest of a request stayed as it is.

    No engine reaches more with these encoders at this precision.
    """
    steps_ms = ours.get("evaluations", ours["steps"]) * ours["step_ms"]["median_ms"]
    at_floor_ms = ours["request_ms"]["median_ms"] - steps_ms * (1 - ours["of_floor"])
    return float(theirs["request_ms"]["median_ms"] / at_floor_ms)


def measured(records: list[Record]) -> str:
    """Every way of every case."""
    rows = [
        [
            f"{hardware(r)}, {r['size']}, {r['dtype']}",
            r["case"],
            r["way"],
            f"{r['image_s']:.2f}",
            f"{r['step_ms']['median_ms']:.0f} ({r['step_ms']['p20_ms']:.0f} to {r['step_ms']['p80_ms']:.0f})",
            f"{r['tflops']:.3g}",
            f"{100 * r['of_floor']:.0f} %",
            f"{r['needed_flops'] / 1e12:.2f} / {'' if r['flops'] is None else format(r['flops'] / 1e12, '.2f')}",
            f"{r['allocations']} / {r['allocated_mib']:.0f}",
            "" if r["host_rise_gib"] is None else f"{r['host_rise_gib']:.2f}",
            "" if r["device_peak_gib"] is None else f"{r['device_peak_gib']:.1f}",
            f"{r['difference']:.1e}",
            r["sha256"][:12],
        ]
        for r in current(records)
    ]
    header = ["machine, size, type", "request", "way", "s an image", "ms a step", "TFLOP/s", "of the floor"]
    header += ["TFLOP a step, needed / computed", "allocations a step / MiB", "host memory above weights, GiB"]
    header += ["GPU memory, GiB", "velocity differs", "SHA-256"]
    return markdown(header, rows) + clock_note(records) + ceilings(records)


def ceilings(records: list[Record]) -> str:
    """What the floor was reckoned with."""
    lines = []
    for (machine, size, dtype), found in runs(current(records)).items():
        rates = found[-1]["ceilings"]
        gemm, attention = (rates[name] / 1e12 for name in ("gemm", "attention"))
        lines.append(
            f"Ceilings of {machine}, {size}, {dtype}, {rates['source']}: products {gemm:.3g} TFLOP/s, attention "
            f"{attention:.3g} TFLOP/s, memory {rates['bandwidth_gbs']:.0f} GB/s."
        )
    return "\n\n" + "\n".join(lines) if lines else ""


def against_code(records: list[Record]) -> str:
    """Our rendering of the authors' way beside their own code, by time of a step and by the memory that a step asks for."""
    rows = []
    for (machine, size, dtype), found in runs(current(records)).items():
        by_case = {(r["case"], r["way"]): r for r in found}
        for case in dict.fromkeys(r["case"] for r in found):
            pair = [by_case.get((case, way)) for way in ("authors' way", "authors' code")]
            if pair[0] is None or pair[1] is None:
                continue
            rendered, code = (r["step_ms"]["median_ms"] for r in pair if r is not None)
            request, memory = (pair[0][quantity] / pair[1][quantity] for quantity in ("image_s", "allocated_mib"))
            cells = [f"{rendered:.0f}", f"{code:.0f}", f"{rendered / code:.3f}", f"{request:.3f}", f"{memory:.3f}"]
            rows.append([f"{machine}, {size}, {dtype}", case, *cells])
    header = [
        "machine, size, type",
        "request",
        "our rendering, ms a step",
        "their code, ms a step",
        "rendering / code",
        "whole request",
        "allocated in a step",
    ]
    return markdown(header, rows) + clock_note(records)


def first(records: list[Record]) -> str:
    """The first request of a process."""
    rows = []
    for r in latest(records, "size", "dtype", "case", "way"):
        compiles = r["device"] == "cuda" or "compiled" in r["way"]
        seconds = [f"{r[key]:.2f}" for key in ("cold_s", "warm_s", "second_s")]
        compiling = f"{r['compile_s']:.2f}" if compiles else "nothing to compile"
        rows.append([f"{hardware(r)}, {r['size']}, {r['dtype']}", r["way"], *seconds, compiling])
    header = ["machine, size, type", "way", "nothing compiled, s", "compiled before, s", "second request, s", "compiling, s"]
    return markdown(header, rows) + clock_note(records)


def not_run(records: list[Record]) -> str:
    """Peers without a number, by machine, and why."""
    found = current(records)
    reasons = {(hardware(r), name): text for r in found for name, text in r["not_run"].items()}
    compared = {(hardware(r), r["way"]) for r in found}
    rows = [[machine, name, text] for (machine, name), text in _in_order(reasons) if (machine, name) not in compared]
    return markdown(["machine", "peer", "why it has no number"], rows)


def _in_order(reasons: dict[tuple[str, str], str]) -> Iterator[tuple[tuple[str, str], str]]:
    """One row for every peer and reason, machines that share both together."""
    together: dict[tuple[str, str], list[str]] = {}
    for (machine, name), text in reasons.items():
        together.setdefault((name, text), []).append(machine)
    for (name, text), machines in together.items():
        yield (", ".join(dict.fromkeys(machines)), name), text


def fits(records: list[Record]) -> str:
    """The fitted time of a step against tokens, and of a request against pictures."""
    from .plots import fit_batch, fit_tokens

    rows = []
    for (machine, size, dtype), found in runs(current(records)).items():
        for way in ways_of(found):
            by_tokens, by_batch = fit_tokens(found, way), fit_batch(found, way)
            tokens = "" if by_tokens is None else f"{by_tokens[0]:.3g} L + {by_tokens[1]:.3g} L² / 1000"
            batch = "" if by_batch is None else f"{by_batch[0]:.2f} + {by_batch[1]:.2f} n"
            rows.append([f"{machine}, {size}, {dtype}", way, tokens, batch])
    return markdown(["machine, size, type", "way", "ms a step of L tokens", "s of a request of n pictures"], rows)


DOCUMENT = "docs/performance.md"
TABLES = (
    Table("README.md", "compare", ("compare",), overview),
    Table(DOCUMENT, "compare", ("compare",), measured),
    Table(DOCUMENT, "compare authors", ("compare",), against_code),
    Table(DOCUMENT, "compare fits", ("compare",), fits),
    Table(DOCUMENT, "compare first", ("compare_first",), first),
    Table(DOCUMENT, "compare not run", ("compare",), not_run),
)
