"""Opening a transformer's weights whatever tool wrote them, under the engine's canonical keys.

Known: Black Forest Labs' single files (FLUX.1-dev, Krea-dev, schnell); ComfyUI's files with a ``model.diffusion_model.``
prefix, alone or beside text encoders and autoencoder; diffusers' folders and files; GGUF; 8-bit weights with scales.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from uso_engine.errors import CheckpointError
from uso_engine.model.params import TransformerParams
from uso_engine.weights.diffusers_keys import FusedSource, diffusers_pieces, diffusers_shapes
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.foreign_quantization import foreign_quantization
from uso_engine.weights.files.key_report import bulleted, compare_shapes, key_count, summarise_keys
from uso_engine.weights.files.stored_scales import with_scales
from uso_engine.weights.files.tensor_source import RenamedSource, TensorSource, shapes_of, without_prefix
from uso_engine.weights.kontext import refuse_kontext
from uso_engine.weights.model_shapes import transformer_shapes

logger = logging.getLogger(__name__)

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.", "")
_MARKERS = re.compile(r"__\w+__|model_ema\..*|scaled_fp8|v_pred|ztsnr|global_step|denoiser\.sigmas")
_NORM = re.compile(r"(?P<norm>.*\.(?:query|key)_norm)\.weight")
_OTHER_COMPONENTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "text_encoder")


def open_transformer_checkpoint(path: Path, params: TransformerParams, *, accept_kontext: bool = True) -> TensorSource:
    """Open a transformer checkpoint under canonical keys.

    Args:
        path: a safetensors or GGUF file, an index of shards, or a folder with one or with a ``transformer`` subfolder.
        params: the sizes that the checkpoint must have.
        accept_kontext: whether a file that says it is FLUX.1-Kontext, whose keys and sizes are dev's, is taken.

    Returns:
        A source with exactly the keys and shapes of :func:`transformer_shapes`; weights that are stored apart are put together
        when they are read.

    Raises:
        MissingFileError: the path, or a shard, is not there.
        CheckpointError: it is no FLUX transformer, or another one than ``params`` says; every key at fault is in the message.
        BackendError: a GGUF file, and the library that reads it is not installed.
    """
    source = open_checkpoint(path, subfolder="transformer")
    try:
        if not accept_kontext:
            refuse_kontext(path, source)
        return _canonical(source, params)
    except BaseException:
        source.close()
        raise


def _canonical(source: TensorSource, params: TransformerParams) -> TensorSource:
    keys = source.keys()
    for prefix in _PREFIXES:
        if any(key.startswith((f"{prefix}double_blocks.", f"{prefix}single_blocks.")) for key in keys):
            view = _with_scale_norms(_readable(_stripped(source, prefix)))
            _require(view, transformer_shapes(params), params)
            return view
    for prefix in _PREFIXES:
        if any(key.startswith((f"{prefix}transformer_blocks.", f"{prefix}single_transformer_blocks.")) for key in keys):
            view = _readable(_stripped(source, prefix))
            _require(view, diffusers_shapes(params), params)
            return FusedSource(view, diffusers_pieces(params), transformer_shapes(params))
    expected = "double_blocks.* (Black Forest Labs, ComfyUI) or transformer_blocks.* (diffusers)"
    raise CheckpointError(
        f"{source.describe()} is not a FLUX transformer: expected keys {expected}, {_guess(keys)}"
        f"found {key_count(keys)}: {summarise_keys(keys) or 'none'}"
    )


def _stripped(source: TensorSource, prefix: str) -> TensorSource:
    """The keys under a prefix without it; what other tools keep in the same file is left out, anything else is left in."""
    keys = source.keys()
    outside = [key for key in keys if not key.startswith(prefix)]
    markers = [key for key in keys if _MARKERS.fullmatch(key.removeprefix(prefix))]
    beside = [key for key in outside if key not in markers]
    unknown = [key for key in beside if not key.startswith(_OTHER_COMPONENTS)]
    if unknown:
        raise CheckpointError(
            f"{source.describe()}: {key_count(unknown)} left over beside {prefix}*: {summarise_keys(unknown)}"
        )
    if beside:
        logger.info("%s: %d keys of other components are not used here", source.describe(), len(beside))
    if markers:
        logger.info("%s: bookkeeping that is not used here: %s", source.describe(), summarise_keys(markers))
    if not prefix and not markers:
        return source
    # What says that others have scales stays: a weight that lost its own must not pass for a plain one.
    left = {key for key in markers if not key.endswith("scaled_fp8")}
    return without_prefix(source, prefix, keys=[key for key in keys if key not in left])


def _readable(source: TensorSource) -> TensorSource:
    """The same weights without scales; refuses what another tool has quantised in ways that are not read."""
    foreign = foreign_quantization(source.keys(), reads_scales=True)
    if foreign:
        raise CheckpointError(f"{source.describe()} cannot be read: {'; '.join(foreign)}")
    return with_scales(source)


def _with_scale_norms(source: TensorSource) -> TensorSource:
    """Norms' scales that newer exports of ComfyUI call ``.weight``, under their canonical names."""
    names: dict[str, str] = {}
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        match = _NORM.fullmatch(key)
        name = f"{match['norm']}.scale" if match else key
        if name in names:
            raise CheckpointError(f"{source.describe()}: {names[name]} and {key} are the same norm")
        names[name] = key
    return source if all(name == key for name, key in names.items()) else RenamedSource(source, names)


def _require(source: TensorSource, expected: Mapping[str, tuple[int, ...]], params: TransformerParams) -> None:
    found = shapes_of(source)
    problems = compare_shapes(expected, found)
    integers = [key for key in expected if key in found and not source.dtype(key).is_floating_point]
    if integers:
        problems.append(f"{key_count(integers)} of another type than floating point: {summarise_keys(integers)}")
    if problems:
        problems = _explanations(found, params) + problems
        raise CheckpointError(bulleted(f"{source.describe()} does not fit the transformer of the configuration", problems))


def _explanations(found: Mapping[str, tuple[int, ...]], params: TransformerParams) -> list[str]:
    """What the differences mean, where they are of a kind that people meet."""
    sentences = []
    has_guidance = any("guidance_in." in key or "guidance_embedder." in key for key in found)
    if has_guidance and not params.guidance_embed:
        sentences.append(
            "the checkpoint has a guidance embedding (like FLUX.1-dev, Krea-dev), the configuration says guidance_embed = false"
        )
    if not has_guidance and params.guidance_embed:
        sentences.append(
            "the checkpoint has no guidance embedding (like FLUX.1-schnell), the configuration says guidance_embed = true"
        )
    sizes: list[tuple[str, int | None, int]] = [
        ("double blocks (depth)", _blocks(found, "double_blocks.", "transformer_blocks."), params.depth),
        (
            "single blocks (depth_single_blocks)",
            _blocks(found, "single_blocks.", "single_transformer_blocks."),
            params.depth_single_blocks,
        ),
    ]
    for what, axis, keys, wanted in (
        ("rows in the input layer (hidden_size)", 0, ("img_in.weight", "x_embedder.weight"), params.hidden_size),
        ("input channels (in_channels)", 1, ("img_in.weight", "x_embedder.weight"), params.in_channels),
        ("text channels (context_in_dim)", 1, ("txt_in.weight", "context_embedder.weight"), params.context_in_dim),
    ):
        shapes = [found[key] for key in keys if len(found.get(key, ())) == 2]
        sizes.append((what, shapes[0][axis] if shapes else None, wanted))
    sentences += [
        f"the checkpoint has {actual} {what}, the configuration says {wanted}"
        for what, actual, wanted in sizes
        if actual is not None and actual != wanted
    ]
    return sentences


def _blocks(found: Mapping[str, tuple[int, ...]], *prefixes: str) -> int | None:
    for prefix in prefixes:
        numbers = {key[len(prefix) :].split(".", 1)[0] for key in found if key.startswith(prefix)}
        if numbers:
            return len(numbers)
    return None


def _guess(keys: tuple[str, ...]) -> str:
    """What else a file may be, as a clause for the message."""
    if any(".lora_" in key or ".lora." in key or "processor." in key for key in keys):
        return "but this looks like a LoRA (it belongs under [[loras]]), "
    if any(key.startswith(("encoder.down", "decoder.up")) for key in keys):
        return "but this looks like an autoencoder, "
    if any("high_embedding_linear" in key for key in keys):
        return "but this looks like USO's projector, "
    if any(".SelfAttention." in key or "text_model." in key for key in keys):
        return "but this looks like a text or vision encoder, "
    return ""
