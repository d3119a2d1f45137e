"""Tables of a step's floor, its memory, its time by rung of the ladder and against diffusers."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, clock_note, hardware, latest
from benchmarks.turns import is_steady
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import GPUS, Tokens, floor_ms, step_flops
from uso_engine.precision.tiers import TIERS, TierName, linear_classes
from uso_engine.precision.transformer import layer_formats
from uso_engine.sampling import host_bound

from .roofline import memory_bytes
from .sequence_parallel import LINKS, PUBLISHED_SPEEDUP, exchanged_bytes, parallel_step, text_stream_saving_ms


def roofline(records: list[Record]) -> str:
    """The least time of a step on each GPU; computed."""
    params, rows = TransformerParams(), []
    for name, tokens in (
        ("text only", Tokens()),
        ("content", Tokens(content=1024)),
        ("content + 1 style", Tokens(style=192, content=1024)),
    ):
        floors = [floor_ms(params, tokens, gpu) for gpu in GPUS.values()]
        cells = [f"{floor['floor']:.0f} / {floor['separate kernels']:.0f}" for floor in floors]
        rows.append([f"{name}, L = {tokens.all}", f"{step_flops(params, tokens) / 1e12:.1f}", *cells])
    return markdown(["1024 x 1024, bf16", "TFLOP a step", *(f"{name}, ms" for name in GPUS)], rows)


def sequence_parallel(records: list[Record]) -> str:
    """A step on several H100s; computed."""
    params, tokens = TransformerParams(), Tokens(style=192, content=1024)
    alone, rows = parallel_step(params, tokens, 1, LINKS[0]).all, []
    for size in (1, 2, 4, 8):
        steps = [parallel_step(params, tokens, size, link) for link in LINKS]
        published = f"{PUBLISHED_SPEEDUP[size]:.2f}" if size in PUBLISHED_SPEEDUP else ""
        cells = [f"{step.all:.0f} ({alone / step.all:.2f} x)" for step in steps]
        sent = f"{exchanged_bytes(params, tokens, size) / 1e9:.2f}"
        beside = f"{steps[0].copying + steps[0].waiting:.0f}"
        hidden = " / ".join(f"{step.hidden:.1f}" for step in steps)
        more = " / ".join(f"{text_stream_saving_ms(params, tokens, size, link):.1f}" for link in LINKS) if size > 1 else ""
        rows.append([str(size), f"{steps[0].computing:.0f}", sent, beside, hidden, *cells, published, more])
    header = ["H100s", "computing, ms", "sent by each, GB", "copies and waits, ms", "hidden, ms (NVLink / PCIe)"]
    links = [f"step, {link.name}, ms" for link in LINKS]
    return markdown([*header, *links, "published, other engine", "the text stream would hide, ms (NVLink / PCIe)"], rows)


def reads_floats(params: TransformerParams, tier: TierName) -> bool:
    """Whether a tier's products read floats, not 8-bit rows."""
    classes = linear_classes()
    return all(kind == "float" or classes[kind].takes is None for kind in set(layer_formats(params, tier).values()))


def memory(records: list[Record]) -> str:
    """Memory of the transformer while denoising; computed."""
    params, tokens = TransformerParams(), Tokens(style=192, content=1024)
    rows = []
    for tier, row in TIERS.items():
        if row.is_exact:
            continue
        for keeps in (True, False):
            found = memory_bytes(params, tokens, tier=tier, keeps_modulation=keeps, reads_floats=reads_floats(params, tier))
            cells = [f"{found[name] / 1e9:.2f}" for name in ("weights", "modulation_table", "activations")]
            rows.append([tier, "yes" if keeps else "no", *cells, f"{sum(found.values()) / 1e9:.2f}"])
    header = ["weights", "modulation linears stay", "weights, GB", "table, GB", "activations, GB", "sum, GB"]
    return markdown(header, rows)


def ladder(records: list[Record]) -> str:
    """Every rung on every machine that kept its rate."""
    steady = latest(list(filter(is_steady, records)), "workload", "dtype", "rung")
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}, {r['dtype']}",
            r["rung"],
            f"{r['median_ms']:.0f}",
            f"{r['p20_ms']:.0f} to {r['p80_ms']:.0f}",
            f"{r['speedup']:.2f}",
            f"{r['allocations']:.0f}",
            f"{r['difference']:.1e}",
        ]
        for r in steady
    ]
    header = ["machine", "workload", "rung", "ms (median)", "p20 to p80", "times the first", "allocations", "difference"]
    missing = dict.fromkeys(hardware(r) for r in records if hardware(r) not in set(map(hardware, steady)))
    told = "".join(f"\n\nLeft out, {machine}: it did not keep its rate." for machine in missing)
    return markdown(header, rows) + clock_note(records) + told


def step(records: list[Record]) -> str:
    """Ours beside diffusers on every machine."""
    rows = [
        [
            hardware(r),
            f"{r['workload']}, L = {r['tokens']}, {r['dtype']}",
            f"{r['ours_ms']['median_ms']:.0f}",
            f"{r['diffusers_ms']['median_ms']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['flops'] / 1e12:.2f}",
            f"{r['ours_allocations']['allocations']:.0f} / {r['diffusers_allocations']['allocations']:.0f}",
            f"{r['difference']:.1e}",
        ]
        for r in latest(records, "workload", "dtype")
    ]
    header = ["machine", "workload", "ours, ms", "diffusers, ms", "ratio", "TFLOP", "allocations, ours / theirs", "difference"]
    return markdown(header, rows) + clock_note(records)


def stages(records: list[Record]) -> str:
    """What comes before and after the denoising loop, and the loop."""
    rows = [
        [
            hardware(r),
            f"{r['workload']}, {r['dtype']}",
            r["stage"],
            f"{r['median_ms']:.1f}",
            f"{r['p20_ms']:.1f} to {r['p80_ms']:.1f}",
            "" if r["difference"] is None else f"{r['difference']:.1e}",
        ]
        for r in latest(records, "workload", "dtype", "stage")
    ]
    return markdown(["machine", "workload", "stage", "ms (median)", "p20 to p80", "differs from float32"], rows)


def host(records: list[Record]) -> str:
    """What a step of full depth costs the host where nothing is launched."""
    rows = [
        [hardware(r), f"{r['median_ms']:.1f}", f"{r['p20_ms']:.1f} to {r['p80_ms']:.1f}", f"{r['launches']}"]
        for r in latest(records, "workload")
    ]
    return markdown(["machine", "ms of processor time (median)", "p20 to p80", "launches"], rows)


def graphs(records: list[Record]) -> str:
    """Which steps `cuda_graphs = "auto"` captures, by the prediction that it goes by."""
    params, cards = TransformerParams(), {"A100": (8, 0), "RTX 4090": (8, 9), "H100, H200": (9, 0), "B200": (10, 0)}
    rows = []
    for side in (256, 512, 768, 1024):
        tokens = (side // 16) ** 2
        flops = step_flops(params, Tokens(image=tokens))
        queued = host_bound.host_ms(params, 1)
        times = {card: host_bound.gpu_ms(flops, capability) for card, capability in cards.items()}
        cells = [f"{ms:.0f}{', captured' if ms < queued else ''}" for ms in times.values()]
        rows.append([f"{side} x {side}, L = {512 + tokens}", f"{queued:.0f}", *cells])
    return markdown(["picture from text alone, bf16", "host, ms", *(f"{card}, ms" for card in cards)], rows)


TABLES = (
    Table("docs/performance.md", "graphs", (), graphs),
    Table("docs/performance.md", "host", ("host_stub",), host),
    *(Table(document, "step", ("step",), step) for document in ("README.md", "docs/performance.md")),
    *(Table(document, "ladder", ("ladder",), ladder) for document in ("README.md", "docs/performance.md")),
    Table("docs/performance.md", "roofline", (), roofline),
    Table("docs/performance.md", "memory", (), memory),
    Table("docs/scaling.md", "ulysses", (), sequence_parallel),
    Table("docs/performance.md", "stages", ("stage",), stages),
)
