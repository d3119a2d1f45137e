"""Work against quality: every option beside plain fewer steps, on held-out drawings with a model that denoises.

    python -m benchmarks.frontier [--triplets 96] [--seeds 2] [--minutes 40]

is the same as python -m benchmarks.frontier.run. Pictures are made in groups of eight triplets with one seed; what a group came
to is kept in --groups, so that a run that was ended, or that --minutes ended, is gone on with by the same command. The record
counts groups in which every setting is there. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.arguments import BenchmarkParser, amount, whole_number
from benchmarks.measure import write_record
from uso_engine.conditioning.pretrained import fingerprint
from uso_engine.engine import USOEngine
from uso_engine.evaluation.classifiers import load_classifiers
from uso_engine.evaluation.evaluate import draw_held_out
from uso_engine.pipeline import Pipeline

from .cases import encode, make
from .flops import count_ends, request_flops
from .judgement import judge, means
from .settings import EXACT, REFERENCE, SETTINGS, Setting
from .work import Group, Work

CONFIG = "uso-tiny"
GROUP = 8


def groups(triplets: int, seeds: int) -> Iterator[Group]:
    """All triplets with the first seed, then all with the next."""
    for seed in range(seeds):
        for first in range(0, triplets, GROUP):
            yield Group(first, min(GROUP, triplets - first), seed)


def measure_group(pipeline: Pipeline, group: Group, settings: Sequence[Setting], work: Work) -> None:
    """Make and judge a group's pictures of every setting that is not there yet."""
    left = [setting for setting in (REFERENCE, *settings) if not work.has(group, setting)]
    if not left:
        return
    classifiers, cases = load_classifiers(), encode(pipeline, draw_held_out(group.count, group.first))
    if not work.has_pictures(group, EXACT):
        work.keep_pictures(group, EXACT, make(pipeline, cases, EXACT, group.seeds).pictures)
    for setting in left:  # The reference first: the others are compared with its pictures.
        made = make(pipeline, cases, setting, group.seeds)
        if setting == REFERENCE or (group.first == 0 and group.seed == 0):
            work.keep_pictures(group, setting, made.pictures)
        others = zip(made.pictures, cases, work.pictures(group, REFERENCE), work.pictures(group, EXACT), strict=True)
        judged = [judge(classifiers, picture, case.triplet, base, exact) for picture, case, base, exact in others]
        work.add(group, setting, judged, made.denoising_s, made.decoding_s)


def record_of(pipeline: Pipeline, work: Work, settings: Sequence[Setting]) -> dict[str, object]:
    """What all complete groups say of every setting."""
    complete = work.complete((REFERENCE, *settings))
    reference = work.judged(REFERENCE, complete)
    ends = count_ends(pipeline)
    rows = []
    for setting in (REFERENCE, *settings):
        denoising, decoding = work.seconds(setting, complete)
        rows.append(
            {
                "name": setting.name,
                "option": setting.option,
                **asdict(setting),
                **request_flops(pipeline.transformer.params, setting, ends),
                "denoising_s": round(denoising, 5),
                "decoding_s": round(decoding, 5),
                **means(work.judged(setting, complete), reference),
            }
        )
    pictures = sum(map(len, reference.values()))
    return {
        "config": CONFIG,
        "triplets": len(reference),
        "pictures": pictures,
        "clock": "process",
        "device": "cpu",
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "out")
    parser.add_argument("--triplets", type=whole_number, default=96, metavar="N", help="held-out triplets; by default 96")
    parser.add_argument("--seeds", type=whole_number, default=2, metavar="N", help="pictures of each; by default 2")
    parser.add_argument("--minutes", type=amount, default=40.0, metavar="M", help="begin no group after that; by default 40")
    parser.add_argument("--groups", type=Path, default=Path("build/frontier"), metavar="FOLDER", help="where groups are kept")
    parser.add_argument("--sheet", type=Path, default=None, metavar="FILE", help="write a contact sheet of every setting")
    options = parser.read(arguments)
    if options.triplets < 2:
        parser.error(f"--triplets {options.triplets}: expected at least 2")
    ends_s = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    with USOEngine.from_config(CONFIG, device="cpu") as engine:
        pipeline = engine.pipeline
        work = Work(options.groups, fingerprint([pipeline.transformer], pipeline.loaded.tier))
        for group in groups(options.triplets, options.seeds):
            if time.monotonic() > ends_s:
                print(f"{options.minutes:g} minutes are over; the same command goes on")
                break
            measure_group(pipeline, group, SETTINGS, work)
            print(f"{group}: done", flush=True)
        record = record_of(pipeline, work, SETTINGS)
        if options.sheet is not None:
            work.sheet((REFERENCE, *SETTINGS), min(GROUP, options.triplets)).save(options.sheet, quality=90)
    print(f"written to {write_record('frontier', record, options.out)}")


if __name__ == "__main__":
    main()
