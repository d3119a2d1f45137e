"""Encoders from single files, as ComfyUI keeps them: T5, CLIP and SigLIP alone, or T5 and CLIP in an all-in-one checkpoint.

Keys are transformers', bare or under a prefix such as ``text_encoders.t5xxl.transformer.``; weights may be plain, in 8 bits
with scales, or (T5) in GGUF under llama.cpp's names. Sizes come from the shapes, and every weight is accounted for.
Source: key names in ComfyUI's comfy/sd.py and comfy/supported_models.py; llama.cpp's gguf-py/gguf/tensor_mapping.py for T5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from uso_engine.conditioning.encoder_sizes import clip_config, siglip_config, t5_config
from uso_engine.errors import CheckpointError
from uso_engine.weights.files.checkpoint_files import open_weights_file
from uso_engine.weights.files.foreign_quantization import foreign_quantization
from uso_engine.weights.files.gguf_file import GGUFSource
from uso_engine.weights.files.key_report import bulleted, compare_shapes, short_reason, summarise_keys
from uso_engine.weights.files.stored_scales import with_scales
from uso_engine.weights.files.tensor_source import RenamedSource, TensorSource, shapes_of, without_prefix
from uso_engine.weights.loading import load_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# A whole T5 has a decoder and its output layer beside the encoder, a whole CLIP the other tower and the projections to the
# space that both share, a whole SigLIP the text tower; older files keep position ids, which are counted now.
BESIDE_T5 = ("decoder.", "lm_head.weight")
BESIDE_CLIP = (
    "vision_model.",
    "visual_projection.weight",
    "text_projection.weight",
    "logit_scale",
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
)
BESIDE_TOWER = (
    "text_model.",
    "logit_scale",
    "logit_bias",
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
)
_LLAMA_T5 = (
    (re.compile(r"^token_embd\."), "shared."),
    (re.compile(r"^enc\.output_norm\."), "encoder.final_layer_norm."),
    (re.compile(r"^enc\.blk\."), "encoder.block."),
    (re.compile(r"\.attn_norm\."), ".layer.0.layer_norm."),
    (re.compile(r"\.attn_rel_b\."), ".layer.0.SelfAttention.relative_attention_bias."),
    (re.compile(r"\.attn_([qkvo])\."), r".layer.0.SelfAttention.\1."),
    (re.compile(r"\.ffn_norm\."), ".layer.1.layer_norm."),
    (re.compile(r"\.ffn_gate\."), ".layer.1.DenseReluDense.wi_0."),
    (re.compile(r"\.ffn_up\."), ".layer.1.DenseReluDense.wi_1."),
    (re.compile(r"\.ffn_down\."), ".layer.1.DenseReluDense.wo."),
)


@dataclass(frozen=True)
class EncoderKind:
    """One kind of encoder in a single file.

    Args:
        what: what messages call it.
        key: a key that only this kind has.
        configure: its configuration from the shapes of its weights.
        class_name: of the transformers class.
        harmless: keys, and prefixes that end in a dot, which such files hold besides the encoder.
    """

    what: str
    key: str
    configure: Callable[[TensorSource], PretrainedConfig]
    class_name: str
    harmless: tuple[str, ...]


T5 = EncoderKind("T5 text encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", t5_config, "T5EncoderModel", BESIDE_T5)
CLIP = EncoderKind(
    "CLIP text encoder", "text_model.encoder.layers.0.self_attn.q_proj.weight", clip_config, "CLIPTextModel", BESIDE_CLIP
)
SIGLIP = EncoderKind(
    "vision encoder", "vision_model.encoder.layers.0.self_attn.q_proj.weight", siglip_config, "SiglipVisionModel", BESIDE_TOWER
)


def load_encoder_file(kind: EncoderKind, path: Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load an encoder from one file.

    Args:
        kind: `T5`, `CLIP` or `SIGLIP`.
        path: a safetensors or GGUF file, of the encoder alone or of several components.
        dtype: of the parameters.
        device: where they end up.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: no such encoder in it, or weights that are missing, left over, of another shape or not numbers; all are
            named.
        BackendError: a GGUF file, and the gguf library is not installed.
    """
    source = open_weights_file(path)
    try:
        model, view = _prepared(kind, source)
        module: nn.Module = model
        load_parameters(module, view, device=device, dtype=dtype)
        if kind is T5:
            # One table under two names.
            module.encoder.embed_tokens.weight = module.shared.weight  # type: ignore[union-attr]
        _fill_positions(module, device)
        module.eval().requires_grad_(False)
        return model
    finally:
        source.close()


def check_encoder_file(kind: EncoderKind, path: Path) -> PreTrainedModel:
    """Check keys, shapes and scales of an encoder in one file, without reading its weights.

    Args:
        kind: see `load_encoder_file`.
        path: see `load_encoder_file`.

    Returns:
        The model on the meta device.

    Raises:
        MissingFileError, CheckpointError, BackendError: as for `load_encoder_file`.
    """
    source = open_weights_file(path)
    try:
        model, view = _prepared(kind, source)
        module: nn.Module = model
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if problems := compare_shapes(expected, shapes_of(view)):
            raise CheckpointError(bulleted(f"{kind.what}: {path} does not fit", problems))
        return model
    finally:
        source.close()


def _prepared(kind: EncoderKind, source: TensorSource) -> tuple[PreTrainedModel, TensorSource]:
    """The model on the meta device, and the file's weights under its names."""
    import transformers

    path = source.describe()
    view = _component(_as_transformers(source), kind.key, kind.what)
    if problems := foreign_quantization(view.keys(), reads_scales=True):
        raise CheckpointError(f"{kind.what}: {path} cannot be read: {'; '.join(problems)}")
    plain = _with_shared(with_scales(view))
    config = kind.configure(plain)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, kind.class_name)(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{kind.what}: {path} has sizes that no such model has: {short_reason(error)}") from error
    return model, _named_for(model, plain, kind.harmless)


def _as_transformers(source: TensorSource) -> TensorSource:
    """A GGUF's keys as transformers calls them; other files have them so."""
    if not isinstance(source, GGUFSource):
        return source
    names: dict[str, str] = {}
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        name = key
        for pattern, replacement in _LLAMA_T5:
            name = pattern.sub(replacement, name)
        names[name] = key
    return RenamedSource(source, names)


def _component(source: TensorSource, key: str, what: str) -> TensorSource:
    """The part of a file whose keys are one encoder's, without their prefix."""
    prefixes = [found[: -len(key)] for found in source.keys() if found.endswith(key)]  # noqa: SIM118
    # An all-in-one checkpoint of another family has two CLIPs; FLUX's is this one.
    chosen = [prefix for prefix in prefixes if "clip_l" in prefix] if len(prefixes) > 1 else prefixes
    if len(chosen) != 1:
        keys = source.keys()
        several = (
            f"several: under {summarise_keys(prefixes)}" if prefixes else f"none among {len(keys)} keys: {summarise_keys(keys)}"
        )
        raise CheckpointError(f"{what}: expected one encoder with keys *{key} in {source.describe()}, found {several}")
    return without_prefix(source, chosen[0])


def _with_shared(source: TensorSource) -> TensorSource:
    """T5's table of words as ``shared.weight``, which some files have under the encoder's name only."""
    keys = source.keys()
    other = "encoder.embed_tokens.weight"
    if other not in keys or "shared.weight" in keys:
        return source
    return RenamedSource(source, {key: key for key in keys} | {"shared.weight": other})


def _named_for(module: nn.Module, source: TensorSource, harmless: Sequence[str]) -> TensorSource:
    """The source under the module's names: some releases of transformers leave out the outermost one."""
    held = set(source.keys())
    names: dict[str, str] = {}
    for name in module.state_dict():
        aliases = (name, f"text_model.{name}", f"vision_model.{name}")
        found = next((alias for alias in aliases if alias in held), None)
        if found is None and name == "encoder.embed_tokens.weight":
            found = "shared.weight"
        if found is not None:
            names[name] = found
    prefixes = tuple(entry for entry in harmless if entry.endswith("."))
    beside = held - set(names.values())
    left_over: Mapping[str, str] = {
        key: key for key in sorted(beside) if key not in harmless and not key.startswith(prefixes) and key != "spiece_model"
    }
    return RenamedSource(source, {**names, **left_over})


def _fill_positions(module: nn.Module, device: torch.device | str) -> None:
    """Numbers of positions are no weights: they are in no file, and were made on the meta device."""
    for path, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, name = path.rpartition(".")
            if name != "position_ids":
                raise CheckpointError(
                    f"this release of transformers keeps {path} beside the weights, whose values are not known"
                )
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(name, positions, persistent=False)
