"""Finding tokenizers for encoders that are single files: in the ComfyUI installation around them, or in the hub's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uso_engine.errors import MissingFileError
from uso_engine.weights.files.paths import resolve_path

# Sets of files of which one must be complete.
T5_FILES = (["tokenizer.json"], ["spiece.model"])
CLIP_FILES = (["tokenizer.json"], ["vocab.json", "merges.txt"])

_MOST_PARENTS = 8


@dataclass(frozen=True)
class TokenizerHome:
    """Where an encoder's tokenizer may be.

    Args:
        encoder: "T5" or "CLIP".
        in_comfyui: folder inside a ComfyUI installation.
        repository: on the hub, not gated.
        files: sets of files of which one must be complete.
        size_kb: of what is to be downloaded.
    """

    encoder: str
    in_comfyui: str
    repository: str
    files: tuple[list[str], ...]
    size_kb: int


TOKENIZERS = (
    TokenizerHome("T5", "comfy/text_encoders/t5_tokenizer", "google/t5-v1_1-xxl", T5_FILES, 800),
    TokenizerHome("CLIP", "comfy/sd1_tokenizer", "openai/clip-vit-large-patch14", CLIP_FILES, 1600),
)
TOKENIZER_PATTERNS = ("tokenizer*.json", "spiece.model", "vocab.json", "merges.txt", "special_tokens_map.json")
"""What is downloaded of a tokenizer's repository."""


def find_tokenizer(encoder: str, file: Path) -> Path:
    """Find the tokenizer of an encoder that is a single file.

    Args:
        encoder: "T5" or "CLIP".
        file: the encoder's, in a ComfyUI installation's models folder or anywhere.

    Raises:
        MissingFileError: there is none; says what to get and how.
    """
    home = next(home for home in TOKENIZERS if home.encoder == encoder)
    for start in dict.fromkeys((file.absolute(), file.resolve())):
        for folder in start.parents[:_MOST_PARENTS]:
            candidate = folder / home.in_comfyui
            if _is_complete(candidate, home):
                return candidate
    try:
        candidate = resolve_path(home.repository, what=f"{encoder} tokenizer")
        if _is_complete(candidate, home):
            return candidate
    except MissingFileError:
        pass
    needed = " or ".join(" and ".join(names) for names in home.files)
    raise MissingFileError(
        f"{encoder} tokenizer: a single file ({file}) has none beside it; looked at {home.in_comfyui} in the folders above it "
        f"and at {home.repository} in the hub's cache; run `uso-engine download --tokenizers` (about {home.size_kb} kB), or "
        f"set tokenizer under [{encoder.lower()}] to a folder with {needed}"
    )


def _is_complete(folder: Path, home: TokenizerHome) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in home.files)
