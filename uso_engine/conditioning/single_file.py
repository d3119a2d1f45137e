"""Encoders from single files, as ComfyUI keeps them: T5, CLIP and SigLIP alone, or T5 and CLIP in an all-in-one checkpoint.

Keys are transformers', bare or under a prefix such as ``text_encoders.t5xxl.transformer.``; weights may be plain, in 8 bits
with scales, or (T5) in GGUF under llama.cpp's names. Sizes come from the shapes, and every weight is accounted for.
Source: key names in ComfyUI's comfy/sd.py and comfy/supported_models.py; llama.cpp's gguf-py/gguf/tensor_mapping.py for T5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from uso_engine.conditioning.encoder_sizes import clip_config, siglip_config, t5_config
from uso_engine.errors import CheckpointError
from uso_engine.weights.checkpoint_files import open_weights_file
from uso_engine.weights.foreign_quantization import foreign_quantization
from uso_engine.weights.gguf_file import GGUFSource
from uso_engine.weights.key_report import short_reason, summarise_keys
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.stored_scales import with_scales
from uso_engine.weights.tensor_source import RenamedSource, TensorSource, without_prefix

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PretrainedConfig, PreTrainedModel, SiglipVisionModel, T5EncoderModel

    M = TypeVar("M", bound=PreTrainedModel)

_T5_KEY = "encoder.block.0.layer.0.SelfAttention.q.weight"
_CLIP_KEY = "text_model.encoder.layers.0.self_attn.q_proj.weight"
_SIGLIP_KEY = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
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


def load_t5_file(path: Path, *, harmless: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """Load a T5 encoder from one file.

    Args:
        path: a safetensors or GGUF file, of T5 alone or of several components.
        harmless: keys, and prefixes that end in a dot, which such files hold besides the encoder.
        dtype: of the parameters.
        device: where they end up.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: no T5 in it, or weights that are missing, left over, of another shape or not numbers; all are named.
        BackendError: a GGUF file, and the gguf library is not installed.
    """
    from transformers import T5EncoderModel

    model = _load(
        T5EncoderModel, path, t5_config, what="T5 text encoder", key=_T5_KEY, harmless=harmless, dtype=dtype, device=device
    )
    # One table under two names.
    model.encoder.embed_tokens.weight = model.shared.weight
    return model


def load_clip_file(path: Path, *, harmless: Sequence[str], dtype: torch.dtype, device: torch.device | str) -> CLIPTextModel:
    """Load a CLIP text model from one file; arguments and errors as for `load_t5_file`."""
    from transformers import CLIPTextModel

    return _load(
        CLIPTextModel, path, clip_config, what="CLIP text encoder", key=_CLIP_KEY, harmless=harmless, dtype=dtype, device=device
    )


def load_vision_file(
    path: Path, *, harmless: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> SiglipVisionModel:
    """Load a SigLIP vision tower from one file; arguments and errors as for `load_t5_file`."""
    from transformers import SiglipVisionModel

    return _load(
        SiglipVisionModel,
        path,
        siglip_config,
        what="vision encoder",
        key=_SIGLIP_KEY,
        harmless=harmless,
        dtype=dtype,
        device=device,
    )


def _load(
    model_class: type[M],
    path: Path,
    configure: Callable[[TensorSource], PretrainedConfig],
    *,
    what: str,
    key: str,
    harmless: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str,
) -> M:
    source = open_weights_file(path)
    try:
        view = _component(_as_transformers(source), key, what)
        if problems := foreign_quantization(view.keys(), reads_scales=True):
            raise CheckpointError(f"{what}: {path} cannot be read: {'; '.join(problems)}")
        plain = _with_shared(with_scales(view))
        config = configure(plain)
        try:
            with torch.device("meta"):
                model = model_class(config)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{what}: {path} has sizes that no such model has: {short_reason(error)}") from error
        module: nn.Module = model
        load_parameters(module, _named_for(module, plain, harmless), device=device, dtype=dtype)
        _fill_positions(module, device)
        module.eval().requires_grad_(False)
        return model
    finally:
        source.close()


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
