"""T5 and CLIP from wherever they lie: a folder of transformers, or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from uso_engine.conditioning.docstrings import require_docstrings
from uso_engine.conditioning.pretrained import load_pretrained
from uso_engine.conditioning.single_file import CLIP, T5, load_encoder_file
from uso_engine.conditioning.tokenizer_folders import find_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel


def tokenizer_folder(encoder: str, model: Path, own: str | Path | None) -> Path:
    """Where an encoder's tokenizer lies: where it is said to, in the encoder's folder, or where `find_tokenizer` finds it."""
    if own is not None:
        return Path(own)
    return find_tokenizer(encoder, model) if model.is_file() else model


def load_t5(path: Path, dtype: torch.dtype, device: torch.device | str) -> T5EncoderModel:
    """Load T5's encoder from a folder or a single file; errors as for `load_pretrained` and `load_encoder_file`."""
    require_docstrings()
    from transformers import T5EncoderModel

    if path.is_file():
        return cast("T5EncoderModel", load_encoder_file(T5, path, dtype=dtype, device=device))
    what = T5.what
    return load_pretrained(
        T5EncoderModel, path, what=what, model_types=("t5",), harmless=T5.harmless, dtype=dtype, device=device
    )


def load_clip(path: Path, dtype: torch.dtype, device: torch.device | str) -> CLIPTextModel:
    """Load CLIP's text model from a folder or a single file; errors as for `load_pretrained` and `load_encoder_file`."""
    require_docstrings()
    from transformers import CLIPTextModel

    if path.is_file():
        return cast("CLIPTextModel", load_encoder_file(CLIP, path, dtype=dtype, device=device))
    what, types = CLIP.what, ("clip_text_model", "clip")
    return load_pretrained(
        CLIPTextModel, path, what=what, model_types=types, harmless=CLIP.harmless, dtype=dtype, device=device
    )
