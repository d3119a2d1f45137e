"""Drawings turned into what a model is asked for, and the pictures that a setting makes of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uso_engine.evaluation.captions import PLACE_WORDS
from uso_engine.evaluation.drawings import Triplet, render
from uso_engine.imaging.pixels import from_pixels, to_pixels
from uso_engine.pipeline import Pipeline
from uso_engine.sampling.admission import Conditions
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.settings import DenoiseSettings

from .settings import Setting

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 128


@dataclass(frozen=True)
class Case:
    """A triplet as the evaluation asks for it: "the object" and a place, content and style as pictures."""

    triplet: Triplet
    conditions: Conditions
    merged: Conditions
    """The same with the prompt's padding merged."""


@dataclass(frozen=True)
class Made:
    """What a setting made of cases.

    Args:
        latents: float32 [n, 16, SIDE / 8, SIDE / 8].
        pictures: decoded.
        denoising_s: processor seconds of admission and all steps.
        decoding_s: processor seconds of decoding.
    """

    latents: Tensor
    pictures: tuple[Image, ...]
    denoising_s: float
    decoding_s: float


def encode(pipeline: Pipeline, triplets: Sequence[Triplet]) -> list[Case]:
    """Encode each triplet's prompt, style and content."""
    found = []
    for triplet in triplets:
        text = pipeline.encode_prompt(f"the object {PLACE_WORDS[triplet.target.place][0]}")
        style = pipeline.encode_style(pipeline.style.preprocess(render(triplet.style, SIDE)))
        content = pipeline.encode_content(to_pixels(render(triplet.content, SIDE)))
        merged = pipeline.conditions(text, [style], [content], merged=text.merged())
        found.append(Case(triplet, pipeline.conditions(text, [style], [content]), merged))
    return found


def make(pipeline: Pipeline, cases: Sequence[Case], setting: Setting, seeds: Sequence[int], *, decode: bool = True) -> Made:
    """Make every case's picture, all in the same steps.

    Args:
        pipeline: of a model whose default size is SIDE.
        cases: what is asked for.
        setting: how.
        seeds: one for each case.
        decode: whether pictures are wanted.
    """
    start = time.process_time()
    sigmas = setting.sigmas(SIDE, SIDE, pipeline.family)
    images = []
    for case, seed in zip(cases, seeds, strict=True):
        asked = DenoiseSettings(SIDE, SIDE, (seed,), sigmas=sigmas, sampler=setting.sampler)
        images += pipeline.admit(case.merged if setting.text_padding == "merge" else case.conditions, asked)
    run = DenoisingRun(pipeline.transformer, images)
    run.run()
    latents = torch.stack(run.latents())
    denoised = time.process_time()
    pictures = tuple(from_pixels(pipeline.decode(latents))) if decode else ()
    return Made(latents, pictures, denoised - start, time.process_time() - denoised)
