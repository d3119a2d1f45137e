"""Timing of variants against each other, and the record of the machine they ran on."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TELLING_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
"""Instruction sets that decide by which library and how fast a CPU multiplies."""
_NO_FILE_NAME = str.maketrans("/(),", "    ")
RESULTS = Path(__file__).resolve().parent / "results"
Run = Callable[[], object]
Clock = Literal["wall", "process"]


def interleave(
    variants: Mapping[str, Run], *, rounds: int, device: torch.device, warmup_s: float = 0.0, clock: Clock = "wall"
) -> dict[str, dict[str, float]]:
    """Time variants in turn, every second round backwards (A B B A), so that what disturbs the machine, and a clock that falls,
    disturbs all of them.

    Args:
        variants: what to run, by name.
        rounds: how often each is timed.
        device: a GPU is timed by events, a CPU by the clock.
        warmup_s: each variant runs for this long before anything is timed; once if it is a GPU's.
        clock: of a CPU: "process" counts the processor time of this process, which is what to compare on a machine that others
            use too, with one thread.

    Returns:
        Median, p20 and p80 in milliseconds, by name.
    """
    for run in variants.values():
        start = time.perf_counter()
        if device.type == "cuda":
            run()
        _finish(device)
        while time.perf_counter() - start < warmup_s:
            run()
            _finish(device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            times[name].append(time_once(variants[name], device, clock))
    return {name: summarise(values) for name, values in times.items()}


def time_once(run: Run, device: torch.device, clock: Clock = "wall") -> float:
    """Milliseconds of one run."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    now = time.process_time if clock == "process" else time.perf_counter
    start = now()
    run()
    return (now() - start) * 1e3


def summarise(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80 of milliseconds."""
    ordered = sorted(values)
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[int(0.2 * (len(ordered) - 1))],
        "p80_ms": ordered[round(0.8 * (len(ordered) - 1))],
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_allocations(run: Run, device: torch.device) -> dict[str, float]:
    """Allocations of one run: how many, and MiB in all.

    On a GPU also how often memory was asked from the driver: after the first step that must be never.
    """
    if device.type == "cuda":
        _finish(device)
        before = torch.cuda.memory_stats(device)
        run()
        _finish(device)
        after = torch.cuda.memory_stats(device)
        keys = ("allocation.all.allocated", "allocated_bytes.all.allocated", "segment.all.allocated")
        count, size, segments = (after[key] - before[key] for key in keys)
        return {"allocations": count, "allocated_mib": size / 2**20, "driver_allocations": segments}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = profiled_allocations(profiler)
    return {"allocations": found.number, "allocated_mib": found.size_bytes / 2**20}


class Allocations(NamedTuple):
    """How many, and the bytes of all of them together."""

    number: int
    size_bytes: int


def profiled_allocations(profiler: Any) -> Allocations:
    """The allocations that a `torch.profiler.profile` with `profile_memory` saw on a CPU."""
    events = profiler.profiler.kineto_results.events()
    positive = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Allocations(len(positive), sum(positive))


def output_hash(*tensors: Tensor) -> str:
    """The first 12 digits of the SHA-256 of tensors' bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def machine() -> dict[str, object]:
    """What a record says about where it was taken."""
    return {"taken": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), **_hardware(), "threads": torch.get_num_threads()}


@cache
def _hardware() -> dict[str, object]:
    """What does not change while a process runs: asking the driver takes a second of a GPU's time."""
    record: dict[str, object] = {
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "tree": tree_hash(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in _cpu_flags() if flag in TELLING_FLAGS],
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,clocks.mem,power.limit"
        record["gpu_state"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return record


@cache
def tree_hash() -> str:
    """SHA-256 of the sources, which tells a commit where a copy without its history runs; the first 12 digits."""
    digest, root = hashlib.sha256(), RESULTS.parents[1]
    for folder in ("benchmarks", "configs", "kernels", "uso_engine"):
        for path in sorted(root.joinpath(folder).rglob("*")):
            if path.suffix in {".py", ".sh", ".toml"}:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def machine_name() -> str:
    """What this machine's records are called after."""
    return file_name(torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_kind(_hardware()))


def cpu_kind(machine: Mapping[str, Any]) -> str:
    """The CPU of a record's `machine`, with what it computes by: a name such as "AMD EPYC" stands for several kinds.

    Older records have the name alone.
    """
    capability = machine.get("cpu_capability")
    if capability is None:
        return str(machine["cpu"])
    return f"{machine['cpu']} ({capability}{', AMX' if 'amx_tile' in machine.get('cpu_flags', ()) else ''})"


def file_name(hardware: str) -> str:
    """A GPU's or CPU's name as the name of the file that its records go to, without suffix."""
    return "-".join(hardware.lower().replace("(r)", "").translate(_NO_FILE_NAME).split())


def write_record(benchmark: str, record: Mapping[str, object], path: Path | None = None) -> Path:
    """Append one JSON line to a file, by default this machine's.

    Returns:
        The file.
    """
    path = RESULTS / f"{machine_name()}.jsonl" if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"benchmark": benchmark, **record, "machine": machine()}) + "\n")
    return path


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ModuleNotFoundError:
        return "none"


def _cpu_name() -> str:
    return _cpu_entry("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return sorted(_cpu_entry("flags").split())


def _cpu_entry(name: str) -> str:
    """What Linux says of the first CPU; empty elsewhere."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""
