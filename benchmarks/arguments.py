"""Options that scripts share, each declared once; values that are unknown or contradict each other are refused.

parser = BenchmarkParser(__doc__, "workload", "device", "rounds", "out", workload="small")
options = parser.read(arguments)

training/arguments.py has the options of the training scripts, read by the same parser.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .workload import WORKLOADS, Workload


def whole_number(text: str) -> int:
    """An integer of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """An integer of at least 0."""
    return 0 if text == "0" else whole_number(text)


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def side(text: str) -> int:
    """Pixels of a side: whole latent cells, two by two."""
    pixels = whole_number(text)
    if pixels % 16:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a multiple of 16")
    return pixels


def workload(text: str) -> Workload:
    """A workload by its name."""
    return WORKLOADS[_one_of(WORKLOADS, text)]


def dtype(text: str) -> torch.dtype:
    """A type that a step is computed in."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[_one_of(("bfloat16", "float32"), text)]


def clock(text: str) -> str:
    """What times a CPU."""
    return _one_of(("wall", "process"), text)


def device(text: str) -> torch.device:
    """A CPU, or a GPU that is there, by its number."""
    name, _, number = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if name != "cuda" or not (number or "0").isdigit():
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: expected cpu, cuda or cuda:0")
    if int(number or 0) >= count:
        raise argparse.ArgumentTypeError(f"no device {text!r}: this machine has {count} GPUs that torch can use")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def _one_of(known: Sequence[str] | dict[str, Workload], text: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(known)}")
    return text


@dataclass(frozen=True)
class Option:
    """A shared option.

    Args:
        read: what a text means.
        default: as it would be typed, or None.
        text: for `--help`.
        values: what may be given, for `--help`.
        is_required: whether a script that shares it cannot do without.
    """

    read: Callable[[str], object]
    default: str | None
    text: str
    values: str
    is_required: bool = False


SHARED = {
    "workload": Option(workload, "full", "sizes of the model and of the request", "|".join(WORKLOADS)),
    "device": Option(device, "cuda" if torch.cuda.is_available() else "cpu", "where it runs", "cpu|cuda|cuda:N"),
    "dtype": Option(dtype, "bfloat16", "type of weights and activations", "bfloat16|float32"),
    "rounds": Option(whole_number, "5", "how often each variant is timed", "N"),
    "cases": Option(whole_number, "10", "requests that are drawn", "N"),
    "clock": Option(clock, "wall", "of a CPU; processor time is for a machine that others use too", "wall|process"),
    "threads": Option(whole_number, None, "of a CPU; by default as many as PyTorch takes", "N"),
    "out": Option(Path, None, "file of JSON lines; by default this machine's in benchmarks/results", "FILE"),
}


class SharedParser(argparse.ArgumentParser):
    """A parser with options of a table.

    Args:
        description: the module's docstring.
        table: the options that may be shared, by name.
        shared: names of those that the script has.
        defaults: of shared options, as they would be typed, where another one fits better.
    """

    def __init__(
        self, description: str | None, table: Mapping[str, Option], shared: Sequence[str], defaults: Mapping[str, str]
    ) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)
        if unknown := sorted(set(defaults) - set(shared)):
            raise TypeError(f"defaults of options that this script has not: {unknown}, expected among {tuple(shared)}")
        for name in shared:
            option = table[name]
            default = defaults.get(name, option.default)
            shown = option.text if default is None else f"{option.text}; by default {default}"
            required = option.is_required and default is None
            self.add_argument(
                f"--{name}", type=option.read, default=default, metavar=option.values, help=shown, required=required
            )

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options.

        Args:
            arguments: by default those of the process.

        Raises:
            SystemExit: one is unknown or makes no sense, or two contradict each other; standard error says what was expected.
        """
        options = self.parse_args(arguments)
        for contradiction in self.contradictions(options):
            self.error(contradiction)
        return options

    def contradictions(self, options: argparse.Namespace) -> Iterator[str]:
        """What of the options cannot be had together."""
        yield from ()


class BenchmarkParser(SharedParser):
    """A parser with shared options of benchmarks.

    Args:
        description: the module's docstring.
        shared: names of shared options.
        defaults: of shared options, as they would be typed, where another one fits better.
    """

    def __init__(self, description: str | None, *shared: str, **defaults: str) -> None:
        super().__init__(description, SHARED, shared, defaults)

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options, PyTorch's number of threads set where it was given."""
        options = super().read(arguments)
        if getattr(options, "threads", None) is not None:
            torch.set_num_threads(options.threads)
        return options

    def contradictions(self, options: argparse.Namespace) -> Iterator[str]:
        """What of shared options cannot be had together."""
        given = vars(options)
        threads = given.get("threads")
        on_gpu = "device" in given and given["device"].type == "cuda"
        if on_gpu and given.get("clock") == "process":
            yield f"--clock process counts the time of a CPU, but --device is {given['device']}: expected --clock wall"
        if on_gpu and threads is not None:
            yield f"--threads {threads} is for a CPU, but --device is {given['device']}: expected no --threads"
        if not on_gpu and given.get("clock") == "process" and (threads or torch.get_num_threads()) > 1:
            yield f"--clock process adds up the time of {threads or torch.get_num_threads()} threads: expected --threads 1"
