"""T5 and CLIP from wherever they lie: a folder of transformers, or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uso_engine.conditioning.pretrained import load_pretrained
from uso_engine.conditioning.single_file import load_clip_file, load_t5_file
from uso_engine.conditioning.tokenizer_folders import find_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

# A whole T5 has a decoder and its output layer beside the encoder, a whole CLIP the other tower and the projections to the
# space that both share; older files keep position ids, which are counted now.
_BESIDE_T5 = ("decoder.", "lm_head.weight")
_BESIDE_CLIP = (
    "vision_model.",
    "visual_projection.weight",
    "text_projection.weight",
    "logit_scale",
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
)


def tokenizer_folder(encoder: str, model: Path, own: str | Path | None) -> Path:
    """Where an encoder's tokenizer lies: where it is said to, in the encoder's folder, or where `find_tokenizer` finds it."""
    if own is not None:
        return Path(own)
    return find_tokenizer(encoder, model) if model.is_file() else model


def load_t5(path: Path, dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """Load T5's encoder from a folder or a single file; errors as for `load_pretrained` and `load_t5_file`."""
    from transformers import T5EncoderModel

    if path.is_file():
        return load_t5_file(path, harmless=_BESIDE_T5, dtype=dtype, device=device)
    what = "T5 text encoder"
    return load_pretrained(
        T5EncoderModel, path, what=what, model_types=("t5",), harmless=_BESIDE_T5, dtype=dtype, device=device
    )


def load_clip(path: Path, dtype: torch.dtype, device: torch.device | str) -> CLIPTextModel:
    """Load CLIP's text model from a folder or a single file; errors as for `load_pretrained` and `load_clip_file`."""
    from transformers import CLIPTextModel

    if path.is_file():
        return load_clip_file(path, harmless=_BESIDE_CLIP, dtype=dtype, device=device)
    what, types = "CLIP text encoder", ("clip_text_model", "clip")
    return load_pretrained(CLIPTextModel, path, what=what, model_types=types, harmless=_BESIDE_CLIP, dtype=dtype, device=device)
