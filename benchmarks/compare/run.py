"""Whole requests by the engine and by every other way that can be had, in turn in one process, on the same weights.

    python -m benchmarks.compare                        full size; six cases, a GPU
    python -m benchmarks.compare --small                a third of the width, a quarter of the tokens: minutes on a CPU
    python -m benchmarks.compare --config uso-flux-dev  real weights, where they are
    python -m benchmarks.compare --first-requests       instead, the first request of fresh processes

A request is text, style and content encoders, denoising, decoding and PNG, nothing of it cached. Without a configuration
weights are random and made on the device. A configuration also says what size, steps, guidance and content side requests have;
its tier, its sampler and its limits of sizes are left aside. The first velocity of every way is compared with the engine's: a
way that computes something else is not timed. Each case ends with its records; one that stands in the file already, from the
same sources and from a configuration that says the same and has the same files, is not measured again (`--again`), unless the
machine did not keep its rate meanwhile. USO_REFERENCE_DIR names a checkout of the authors' code, which then runs too.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import RESULTS, machine_name, summarise, tree_hash, write_record
from benchmarks.turns import MOST_SPREAD, Product, Turns, is_steady, spread
from uso_engine.config import load_config
from uso_engine.errors import USOError
from uso_engine.model.roofline import floor_ms, step_flops
from uso_engine.profiling.ceilings import MeasuredRates, measure_rates
from uso_engine.verification.measure import relative_error

from . import first_request
from .cases import SIZES, Case
from .configured import ConfiguredModels
from .diffusers_way import DiffusersWay
from .memory import Rise, peak_rise
from .models import Models
from .peers import Make, default_tiers, ways
from .way import Requested, Way, time_request

SEED = 11


class Comparison:
    """One run.

    Args:
        options: as the command line gives them.
        command: the line itself.
    """

    def __init__(self, options: Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.models = models_of(options)
        self.size = self.models.size
        compiles = options.device.type == "cuda" or options.compile
        tiers = default_tiers(options.device) if options.tiers is None else tuple(options.tiers)
        self.make, self.reasons = ways(self.models, options.clock, compiles=compiles, tiers=tiers)
        if options.ways is not None:
            wanted = ["ours", *(name for name in options.ways if name != "ours")]
            if unknown := [name for name in wanted if name not in self.make]:
                raise SystemExit(f"--ways: unknown or not to be had here: {unknown}, expected some of {list(self.make)}")
            self.make = {name: self.make[name] for name in wanted}
        self.path: Path = options.out if options.out is not None else RESULTS / f"{machine_name()}.jsonl"
        self.ceilings: MeasuredRates | None = None

    @property
    def cases(self) -> tuple[Case, ...]:
        """What is asked for and has no records yet."""
        known = (*self.size.core(), *self.size.rest())
        wanted = (*self.size.core(), *(self.size.rest() if self.options.rest else ()))
        if self.options.cases is not None:
            by_name = {case.name: case for case in known}
            if unknown := [name for name in self.options.cases if name not in by_name]:
                raise SystemExit(f"--cases: unknown {unknown}, expected some of {list(by_name)}")
            wanted = tuple(by_name[name] for name in self.options.cases)
        done = set() if self.options.again else done_cases(self.path, self.key)
        # Once each: shapes of a very small configuration may coincide.
        return tuple(case for case in dict.fromkeys(wanted) if case.name not in done)

    @property
    def key(self) -> dict[str, object]:
        """What a record has in common with those of the same measurement."""
        options = self.options
        dtype = str(options.dtype).removeprefix("torch.")
        models = {"size": self.size.name, "config": self.models.identity, "dtype": dtype}
        common = {**models, "device": options.device.type, "rounds": options.rounds, "clock": options.clock}
        return {**common, "ways": list(self.make)}

    def run(self) -> None:
        """Measure every case that is left."""
        cases = self.cases
        if not cases:
            print(f"every case has its records in {self.path}; --again measures once more")
            return
        made = self.make_ways(self.make)
        try:
            for case in cases:
                self.measure_ceilings()
                self.measure(case, made)
                gc.collect()
        finally:
            for way in made:
                way.close()

    def measure_ceilings(self) -> None:
        """Before every case once more: the best so far is what a machine that others disturb comes nearest to."""
        clock = time.process_time if self.options.clock == "process" else time.perf_counter
        found = measure_rates(self.options.device, self.options.dtype, clock)
        self.ceilings = found if self.ceilings is None else self.ceilings.best(found)

    def make_ways(self, make: dict[str, Make]) -> list[Way]:
        """Every way, its weights in place; on a GPU diffusers has chosen its attention."""
        made = [build() for build in make.values()]
        for way in made:
            if isinstance(way, DiffusersWay):
                way.choose_attention(self.size.core()[-1])
        return made

    def measure(self, case: Case, made: list[Way]) -> None:
        """Check, time and record one case.

        Raises:
            SystemExit: a way computes something else than the first.
        """
        inspected = {way.name: self.inspect(case, way) for way in made}
        truth = inspected[made[0].name]["velocity"]
        differences = {way.name: relative_error(inspected[way.name]["velocity"], truth) for way in made}
        wrong = {way.name: differences[way.name] for way in made if not differences[way.name] <= way.largest_difference}
        if wrong:
            raise SystemExit(f"{case.name}: these do not compute the engine's velocity: {wrong}")
        product = Product(self.options.device, self.options.dtype, self.options.clock)
        requests = {way.name: partial(time_request, way, case, SEED, self.options.clock) for way in made}
        timings = Turns(requests, product.time).take(self.options.rounds)
        ours = statistics.median(request.request_ms for request in timings.found[made[0].name])
        for way in made:
            record = self.record(case, way, timings.found[way.name], inspected[way.name])
            record |= {"difference": differences[way.name], "times_ours": record["request_ms"]["median_ms"] / ours}
            record |= {"product_ms": timings.product_ms, "requests_left_out": timings.left_out}
            write_record("compare", record, self.path)
            print(line_of(record), flush=True)
        if spread(timings.product_ms) > MOST_SPREAD:
            print(
                f"{case.name}: tables leave this case out: the same product took {timings.product_ms['p20_ms']:.1f} to "
                f"{timings.product_ms['p80_ms']:.1f} ms between its requests, the machine did not keep its rate; "
                "the same command measures it again",
                flush=True,
            )

    def inspect(self, case: Case, way: Way) -> dict[str, Any]:
        """One request that is not timed: what its first evaluation takes and gives, the memory, and the picture."""
        way.evaluations.inspect()
        with peak_rise(self.options.device) as rise:
            files = way.request(case, SEED)
        counts = way.evaluations.counts
        assert counts is not None
        digest = hashlib.sha256(b"".join(files)).hexdigest()
        found = {"flops": counts.flops or None, "allocations": counts.allocations, "allocated_mib": counts.allocated_mib}
        return {**found, "velocity": way.velocity(counts.velocity, case).float(), "sha256": digest, "rise": rise}

    def record(self, case: Case, way: Way, requests: Sequence[Requested], found: dict[str, Any]) -> dict[str, Any]:
        """A way's record of a case."""
        assert self.ceilings is not None
        params, tokens = self.size.params, self.size.tokens(case)
        timing = summarise([request.request_ms for request in requests])
        evaluations = summarise([milliseconds for request in requests for milliseconds in request.evaluations_ms])
        step_ms = evaluations["median_ms"]
        # One evaluation of several pictures at once does the work of all of them.
        at_once = case.images * self.size.steps_of(case) / len(requests[0].evaluations_ms)
        needed = step_flops(params, tokens) * at_once
        floor = floor_ms(params, tokens, self.ceilings)["floor"] * at_once
        rise: Rise = found.pop("rise")
        del found["velocity"]
        return {
            **self.key,
            "case": case.name,
            "way": way.name,
            "tokens": tokens.all,
            "images": case.images,
            "steps": self.size.steps_of(case),
            "evaluations": len(requests[0].evaluations_ms),
            "request_ms": timing,
            "image_s": timing["median_ms"] / 1e3 / case.images,
            "step_ms": evaluations,
            "needed_flops": needed,
            "tflops": needed / step_ms / 1e9,
            "floor_ms": floor,
            "of_floor": floor / step_ms,
            "ceilings": {"gemm": self.ceilings.gemm_rate, "attention": self.ceilings.attention_rate}
            | {"bandwidth_gbs": self.ceilings.bandwidth_gbs, "source": self.ceilings.source},
            **found,
            "host_rise_gib": rise.host,
            "device_peak_gib": None if rise.device is None else rise.device + way.weights / 2**30,
            "weights_gib": way.weights / 2**30,
            "settings": dict(way.settings),
            "versions": versions(),
            "not_run": self.reasons,
            "command": self.command,
            "tree": tree_hash(),
        }


def models_of(options: Namespace) -> Models:
    """Of a size, or of a configuration.

    Raises:
        SystemExit: a configuration that is not there, not whole, or not comparable.
    """
    if options.config is None:
        return Models(SIZES[options.size], options.device, options.dtype)
    try:
        return ConfiguredModels(load_config(options.config), options.device, options.dtype)
    except USOError as error:
        raise SystemExit(f"--config {options.config}: {error}") from error


def versions() -> dict[str, str]:
    """Of the packages that compute, those that are there."""
    found = {}
    for name in ("torch", "diffusers", "transformers", "torchao", "einops", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def done_cases(path: Path, key: dict[str, object]) -> set[str]:
    """Cases of which every way has a record from the same sources and settings, of a machine that kept its rate."""
    if not path.exists():
        return set()
    seen: dict[str, set[str]] = {}
    for text in path.read_text().splitlines():
        record = json.loads(text) if text.strip() else {}
        same = record.get("benchmark") == "compare" and record.get("tree") == tree_hash() and is_steady(record)
        if same and all(record.get(name) == value for name, value in key.items()):
            seen.setdefault(record["case"], set()).add(record["way"])
    count = len(key["ways"]) if isinstance(key["ways"], list) else 0
    return {case for case, names in seen.items() if len(names) == count}


def line_of(record: dict[str, Any]) -> str:
    """A record in one line."""
    step_ms = record["step_ms"]["median_ms"]
    return (
        f"{record['case']:26s} {record['way']:28s} {record['image_s']:8.2f} s/image {step_ms:9.1f} ms/step "
        f"{record['tflops']:8.3f} TFLOP/s {record['of_floor']:6.1%} of the floor, {record['times_ours']:6.2f} times ours"
    )


def parser() -> BenchmarkParser:
    """The command's options."""
    made = BenchmarkParser(__doc__, "device", "dtype", "rounds", "clock", "threads", "out", rounds="2")
    made.add_argument("--size", choices=SIZES, default="full", help="of the models; by default full")
    made.add_argument("--config", metavar="CONFIG", help="the models of a configuration, from its files, instead of a size's")
    made.add_argument("--small", dest="size", action="store_const", const="small", help="the same as --size small")
    made.add_argument(
        "--rest", action="store_true", help="further cases: another shape, several pictures, few steps, two styles"
    )
    made.add_argument("--cases", nargs="+", metavar="CASE", help="these cases only, such as 512x512-content-style")
    made.add_argument("--ways", nargs="+", metavar="WAY", help='these ways only, such as "diffusers"; the engine is always one')
    made.add_argument("--tiers", nargs="*", metavar="TIER", help="further tiers of the engine; by default a GPU's fast ones")
    made.add_argument("--compile", action="store_true", help="compare compiled diffusers on a CPU too")
    made.add_argument("--again", action="store_true", help="measure cases that have records")
    made.add_argument("--first-requests", action="store_true", help="measure first requests, in processes of their own")
    made.add_argument("--first-of", metavar="WAY", help="in this process, print the seconds of one way's first requests")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().read(arguments)
    command = shlex.join(["python", "-m", "benchmarks.compare", *given])
    comparison = Comparison(options, command)
    if options.first_of is not None:
        first_request.print_first(comparison, options.first_of)
    elif options.first_requests:
        first_request.run(comparison, given)
    else:
        comparison.run()
