"""Whether a machine computed at one rate while requests were timed: one product, made in turn with them.

Neighbours that share a core's matrix unit, a limit of power, another program: they change the rate within seconds, and then no
ratio of medians means what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from benchmarks.measure import Clock, Run, summarise, time_once
from benchmarks.records import Record, hardware
from uso_kernels.cpu import widens

MOST_SPREAD = 1.15
"""p80 over p20 of the product's times, above which tables leave a case out."""
_PER_TURN = 8


class Product:
    """Several products of one size, of the type that the ways compute in, and how long each turn of them took.

    Args:
        device: where.
        dtype: of the ways.
        clock: as `benchmarks.measure.interleave` takes it.
    """

    @torch.no_grad()
    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock) -> None:
        dtype = torch.float32 if widens(torch.empty(0, dtype=dtype, device=device)) else dtype
        n = 8192 if device.type == "cuda" else 1024
        self._operands = [torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)]
        self._device, self._clock = device, clock
        self._times: list[float] = []
        self._multiply()  # A first one chooses and compiles.

    def run(self) -> None:
        """One turn; it ends when the device has ended."""
        # A GPU's by the clock, too: its end is waited for.
        self._times.append(time_once(self._multiply, torch.device("cpu"), self._clock))

    def summary(self) -> dict[str, float]:
        """Median, p20 and p80 of the turns."""
        return summarise(self._times)

    @torch.no_grad()
    def _multiply(self) -> None:
        for _ in range(_PER_TURN):
            F.linear(*self._operands)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def between(requests: Mapping[str, Run], product: Product) -> dict[str, Run]:
    """Requests, and turns of a product: before the first, between every two and after the last."""
    found: dict[str, Run] = {"a product before": product.run}
    for name, request in requests.items():
        found |= {name: request, f"a product after {name}": product.run}
    return found


def spread(timing: dict[str, float]) -> float:
    """p80 over p20."""
    return timing["p80_ms"] / timing["p20_ms"]


def is_steady(record: Record) -> bool:
    """Whether the machine kept its rate during a record's case; true of records from before this was looked at."""
    return "product_ms" not in record or spread(record["product_ms"]) <= MOST_SPREAD


def left_out(records: Sequence[Record], shown: Sequence[Record]) -> str:
    """Which cases tables leave out, by machine, and why; empty where there are none.

    Args:
        records: all.
        shown: those in the tables.
    """
    seen = {(*_run(record), record["case"]) for record in shown}
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        if not is_steady(record) and (*_run(record), record["case"]) not in seen:
            lines.setdefault(_run(record), {})[record["case"]] = spread(record["product_ms"])
    told = (
        f"Left out, {machine}, {size}, {dtype}: {', '.join(cases)}. Between their requests the same product took up to "
        f"{max(cases.values()):.1f} times as long: the machine did not keep its rate."
        for (machine, size, dtype), cases in lines.items()
    )
    return "".join(f"\n\n{line}" for line in told)


def _run(record: Record) -> tuple[str, str, str]:
    return hardware(record), record["size"], record["dtype"]
