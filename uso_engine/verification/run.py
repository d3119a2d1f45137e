"""Rebuild every reference case through the engine's own loaders, model and sampler, and compare what comes out."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uso_engine.conditioning.style import StyleTokens
from uso_engine.config import parse_config
from uso_engine.imaging.resize import keep_size, resize_content
from uso_engine.loading.assembly import load_autoencoder, load_pipeline
from uso_engine.loading.transformer import check_attention
from uso_engine.model.rope import content_positions, grid_positions
from uso_engine.pipeline import Pipeline
from uso_engine.precision.tiers import FLOAT_TIERS, TierName
from uso_engine.process_state import clean_process_state
from uso_engine.sampling.admission import Conditions
from uso_engine.sampling.latents import draw_noise, token_grid
from uso_engine.sampling.schedule import schedule
from uso_engine.sampling.settings import DenoiseSettings
from uso_engine.sampling.step import Step
from uso_kernels.ragged import Ragged

from .case import AutoencoderSettings, Case, CaseSettings, Tables, read_cases
from .measure import FLOAT32_BOUND, Check, bound_for, relative_error
from .small_model import write_small_autoencoder, write_small_model


@dataclass(frozen=True)
class VerifyOptions:
    """How to run the cases.

    Args:
        tier: of the transformer's weights; None: float32 for float32 cases, bf16 with reference numerics for bfloat16 cases.
        device: where to run.
        attention: attention backend by name; "auto" lets the engine choose.
        ulysses: processes that compute every step together.
    """

    tier: TierName | None = None
    device: str = "cpu"
    attention: str = "auto"
    ulysses: int = 1


def verify(folder: Path, options: VerifyOptions) -> Iterator[Check]:
    """Check every case of a folder, and its tables where there are any.

    Args:
        folder: of ``*.safetensors`` cases.
        options: what to run them on.

    Yields:
        One check per compared tensor.

    Raises:
        MissingFileError: no cases.
        CheckpointError: a file that is not a case.
        ConfigError: so many processes do not divide the heads of the cases' transformer.
        ParallelError: they could not compute together.
        BackendError: no such attention here.
    """
    check_attention(options.attention, options.device)
    cases, tables = read_cases(folder)
    for case in cases:
        with clean_process_state():
            if isinstance(case.settings, AutoencoderSettings):
                checks = list(_check_autoencoder(case, case.settings, options))
            else:
                checks = list(_check_transformer(case, case.settings, options))
        yield from checks
    if tables is not None:
        yield from _check_tables(tables)


def case_tier(settings: CaseSettings, options: VerifyOptions) -> TierName:
    """What a case is computed in: what was asked for, or what the case itself is in."""
    if options.tier is not None:
        return options.tier
    return FLOAT_TIERS[settings.dtype]


def _check_transformer(case: Case, settings: CaseSettings, options: VerifyOptions) -> Iterator[Check]:
    tier = case_tier(settings, options)
    if settings.dtype == "bfloat16" and tier != FLOAT_TIERS["bfloat16"]:
        return  # The authors' bfloat16 choices are reproduced by the bf16 tier alone; the others answer to the float32 cases.
    with tempfile.TemporaryDirectory(prefix="uso-verify-") as folder:
        written = write_small_model(settings, Path(folder))
        config = parse_config({**dict(written), "parallel": {"ulysses": options.ulysses}})
        pipeline = load_pipeline(config, device=options.device, tier=tier, attention=options.attention)
        actual = _run_case(pipeline, case, settings)
        pipeline.close()
    for name, expected in _expected(case, settings).items():
        if name not in actual:
            yield Check(case.name, name, float("inf"), FLOAT32_BOUND, "the engine made no such tensor")
            continue
        if name == f"single.{len(_block_names(case)) - 1}":
            first = actual["text_length"]
            expected = expected[int(first) : int(first) + len(actual[name])]
        yield Check(
            case.name,
            name,
            relative_error(actual[name], expected),
            bound_for(name, tier, settings.steps - 1, options.attention),
        )


def _block_names(case: Case) -> list[str]:
    return [name for name in case.tensors if name.startswith("single.")]


def _expected(case: Case, settings: CaseSettings) -> dict[str, Tensor]:
    """The reference's tensors without their batch axis, in the order of the computation, latents apart by step."""
    order = (
        "timesteps",
        "img_ids",
        "ref_ids.",
        "noise",
        "style_tokens.",
        "double.",
        "single.",
        "velocity.",
        "latents",
        "unpacked",
    )
    found: dict[str, Tensor] = {}
    for prefix in order:
        for name in sorted(key for key in case.tensors if key.startswith(prefix)):
            tensor = case.tensors[name]
            if name == "latents":
                found.update({f"latents.{i}": latent for i, latent in enumerate(tensor)})
            else:
                found[name] = tensor if name == "timesteps" else tensor[0]
    return found


def _run_case(pipeline: Pipeline, case: Case, settings: CaseSettings) -> dict[str, Tensor]:
    """What the engine computes for a case, by the reference's names."""
    tensors = case.tensors
    sigmas = pipeline.family.counted_sigmas(settings.steps, settings.width, settings.height)
    grid = token_grid(settings.width, settings.height)
    styles: list[StyleTokens] = [pipeline.encode_style(tensors[f"style_pixels.{i}"]) for i in range(settings.styles)]
    contents = tuple(tensors[f"ref_latent.{i}"][0] for i in range(len(settings.refs)))
    grids = [(height // 2, width // 2) for height, width in settings.refs]
    noise_dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    channels = pipeline.transformer.params.latent_channels
    actual: dict[str, Tensor] = {
        "timesteps": torch.tensor(sigmas, dtype=torch.float64),
        "img_ids": grid_positions(grid),
        "noise": draw_noise(settings.width, settings.height, settings.seed, noise_dtype, channels=channels),
        **{f"ref_ids.{i}": ids for i, ids in enumerate(content_positions(grid, grids, settings.pe))},
        **{f"style_tokens.{i}": style.tokens for i, style in enumerate(styles)},
    }

    def observe(name: str, tensor: Tensor, layout: Ragged) -> None:
        actual["velocity.0" if name == "velocity" else name] = tensor[layout.span(0)].clone()

    def keep_latent(step: Step) -> None:
        actual[f"latents.{step.index}"] = step.latents[0].clone()

    conditions = Conditions(tensors["txt"][0], tensors["vec"][0], tuple(style.tokens for style in styles), contents)
    result = pipeline.denoise(
        conditions,
        DenoiseSettings(
            width=settings.width,
            height=settings.height,
            seeds=(settings.seed,),
            steps=settings.steps,
            guidance=settings.guidance,
            reference_numerics=settings.dtype == "bfloat16",
            position_offset=settings.pe,
        ),
        on_step=keep_latent,
        observer=observe,
    )
    actual["unpacked"] = result.latents[0]
    actual["text_length"] = torch.tensor(len(tensors["txt"][0]) + sum(len(style.tokens) for style in styles))
    return actual


def _check_autoencoder(case: Case, settings: AutoencoderSettings, options: VerifyOptions) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="uso-verify-") as folder:
        config, path = write_small_autoencoder(settings.ae, settings.salt, Path(folder))
        autoencoder = load_autoencoder(config, path, device=options.device)
        latent = autoencoder.encode(case.tensors["pixels"])
        decoded = autoencoder.decode(case.tensors["latent"])
    for name, actual in (("latent", latent[None]), ("decoded", decoded)):
        yield Check(case.name, name, relative_error(actual, case.tensors[name]), FLOAT32_BOUND)


def synthetic_image(width: int, height: int, seed: int) -> Image.Image:
    """The picture that the tables' resize rules were measured on."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [127.5 + 127.5 * np.sin(x / (7 + seed) + c) * np.cos(y / (11 + 2 * seed) - c) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().clip(0, 255).astype(np.uint8))


def _check_tables(tables: Tables) -> Iterator[Check]:
    for size, row in tables.preprocess_ref.items():
        width, height = (int(side) for side in size.split("x"))
        image = resize_content(synthetic_image(width, height, cast(int, row["image_seed"])))
        name = f"preprocess_ref {size}"
        same = list(image.size) == row["size"] and list(keep_size(width, height)) == row["keep_size"]
        note = f"{image.size}, keep_size {keep_size(width, height)}"
        yield Check("tables", f"{name} size", 0.0 if same else float("inf"), 0.0, note)
        pixels = np.asarray(image).astype(np.float64)
        found = (pixels.mean((0, 1)), pixels[0, 0], pixels[image.height // 2, image.width // 2])
        expected = (row["mean"], row["corner"], row["centre"])
        worst = max(float(np.abs(a - np.asarray(b)).max()) for a, b in zip(found, expected, strict=True))
        crc = "same bytes" if zlib.crc32(image.tobytes()) == row["crc32"] else "bytes differ (another Pillow version may)"
        yield Check("tables", f"{name} pixels", worst, 1.0, crc)
    for key, expected_times in tables.schedule.items():
        steps, size = key.split("@")
        width, height = (int(side) for side in size.split("x"))
        times = torch.tensor(schedule(int(steps), width, height), dtype=torch.float64)
        error = relative_error(times, torch.tensor(expected_times, dtype=torch.float64))
        yield Check("tables", f"schedule {key}", error, FLOAT32_BOUND)
