"""Loading the autoencoder: Black Forest Labs' ``ae.safetensors``, alone or inside a ComfyUI file, or diffusers' folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from uso_engine.errors import CheckpointError
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.key_report import bulleted, compare_shapes, key_count, short_key, summarise_keys
from uso_engine.weights.files.tensor_source import MemorySource, TensorSource, shapes_of, without_prefix
from uso_engine.weights.loading import load_parameters

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)

_PREFIXES = ("first_stage_model.", "vae.")
_OTHER_COMPONENTS = ("model.diffusion_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "model_ema.")


def load_autoencoder(
    path: Path, params: AutoencoderParams, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderKL:
    """Build diffusers' autoencoder and fill it from a checkpoint, without the network.

    Args:
        path: a safetensors file, or a folder with one or with a ``vae`` subfolder.
        params: the sizes that the checkpoint must have.
        device: where it goes.
        dtype: of its weights.

    Returns:
        The autoencoder in evaluation mode, without gradients; ``config.scaling_factor`` and ``shift_factor`` are ``params``'.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is no FLUX autoencoder, or one of other sizes; every key at fault is in the message.
    """
    source = open_checkpoint(path, subfolder="vae")
    try:
        if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in source.keys()):  # noqa: SIM118
            _check_settings(path, params)
            module = _empty(params)
            _require(source, {key: tuple(t.shape) for key, t in module.state_dict().items()})
            load_parameters(module, source, device=device, dtype=dtype)
        else:
            module = _empty(params)
            load_parameters(module, _converted(_own_keys(source), params), device=device, dtype=dtype)
    finally:
        source.close()
    return cast("AutoencoderKL", module.eval().requires_grad_(False))


def check_autoencoder(path: Path, params: AutoencoderParams) -> None:
    """Check keys and shapes of an autoencoder's checkpoint without reading its weights.

    Args:
        path: see `load_autoencoder`.
        params: see `load_autoencoder`.

    Raises:
        MissingFileError, CheckpointError: as for `load_autoencoder`.
    """
    source = open_checkpoint(path, subfolder="vae")
    try:
        if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in source.keys()):  # noqa: SIM118
            _check_settings(path, params)
            _require(source, {key: tuple(t.shape) for key, t in _empty(params).state_dict().items()})
        else:
            _require(_own_keys(source), autoencoder_shapes(params))
    finally:
        source.close()


def _empty(params: AutoencoderParams) -> nn.Module:
    """An autoencoder on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module = AutoencoderKL(
            in_channels=params.in_channels,
            out_channels=params.out_ch,
            **_block_types(params),
            block_out_channels=tuple(params.ch * m for m in params.ch_mult),
            layers_per_block=params.num_res_blocks,
            act_fn="silu",
            latent_channels=params.z_channels,
            norm_num_groups=params.norm_groups,
            sample_size=params.resolution,
            scaling_factor=params.scale_factor,
            shift_factor=params.shift_factor,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=True,
        )
    return cast(nn.Module, module)


def _block_types(params: AutoencoderParams) -> dict[str, tuple[str, ...]]:
    """The levels under the names that diffusers gives them."""
    levels = len(params.ch_mult)
    return {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}


def _own_keys(source: TensorSource) -> TensorSource:
    """The autoencoder's keys without the prefix they have beside other models in one file."""
    keys = source.keys()
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            outside = [key for key in keys if not key.startswith(prefix)]
            unknown = [key for key in outside if not key.startswith(_OTHER_COMPONENTS)]
            if unknown:
                raise CheckpointError(
                    f"{source.describe()}: {key_count(unknown)} left over beside {prefix}*: {summarise_keys(unknown)}"
                )
            if outside:
                logger.info("%s: %d keys of other components are not used here", source.describe(), len(outside))
            return without_prefix(source, prefix)
    return source


def _require(source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = compare_shapes(expected, shapes_of(source))
    if problems:
        raise CheckpointError(bulleted(f"{source.describe()} does not fit the autoencoder of the configuration", problems))


def _converted(source: TensorSource, params: AutoencoderParams) -> TensorSource:
    """The tensors of a Black Forest Labs file under diffusers' keys, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    expected = autoencoder_shapes(params)
    _require(source, expected)
    tensors = {key: source.read(key) for key in expected}
    converted = convert_ldm_vae_checkpoint(tensors, _block_types(params))
    return MemorySource(converted, source.describe())


def _check_settings(path: Path, params: AutoencoderParams) -> None:
    """Refuse a diffusers folder whose config.json scales latents otherwise than the configuration: no weight would show it."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not file.is_file():
        return
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {short_key(str(error))}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    problems = []
    for name, ours, wanted in (
        ("scaling_factor", "scale_factor", params.scale_factor),
        ("shift_factor", "shift_factor", params.shift_factor),
    ):
        value = settings.get(name)
        if isinstance(value, int | float) and not math.isclose(value, wanted, rel_tol=1e-6):
            problems.append(f"{name} is {value} there, the configuration says {ours} = {wanted}")
    if problems:
        raise CheckpointError(bulleted(f"{file} does not fit the configuration", problems))
