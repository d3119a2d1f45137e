"""The table of each kernel alone against plain PyTorch and `torch.compile`."""

from __future__ import annotations

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, hardware, latest


def kernels(records: list[Record]) -> str:
    """Every kernel on every machine."""
    rows = []
    for r in latest(records, "kernel", "rows", "width"):
        compiled = r["times"].get("torch.compile")
        rate = f"{r['tflops']:.0f} TFLOP/s" if r["tflops"] else f"{r['gbs']:.0f} GB/s"
        cells = [f"{r['times'][name]['median_ms'] * 1e3:.0f}" for name in ("ours", "eager")]
        cells.append(f"{compiled['median_ms'] * 1e3:.0f}" if compiled else "")
        rows.append([hardware(r), r["kernel"], *cells, rate, f"{100 * r['share_of_ceiling']:.0f} %"])
    header = ["machine", "kernel", "ours, us", "eager, us", "torch.compile, us", "rate", "of the ceiling"]
    return markdown(header, rows)


TABLES = (Table("docs/performance.md", "kernels", ("kernel",), kernels),)
