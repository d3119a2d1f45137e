"""Prompt to token ids: cleaned, padded to a fixed length, and a record of what did not fit.

Source of the cleaning: transformers' CLIPTokenizer as the authors run it (ftfy's fix_text, then whitespace and lower case).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
from torch import Tensor

from uso_engine.conditioning.model_folder import require_files
from uso_engine.conditioning.tokenizer_folders import CLIP_FILES, T5_FILES
from uso_engine.errors import CheckpointError
from uso_engine.weights.files.key_report import short_reason

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

_PROBE = "a small house by the sea, with a tree"


@dataclass(frozen=True)
class Truncation:
    """Where an encoder stopped reading a prompt.

    Args:
        encoder: "T5" or "CLIP".
        limit: tokens it takes, its markers for beginning and end included.
        length: tokens the whole prompt would have had.
        cut_after: the last words it read, at most 40 characters.
        lost: the text it never saw.
    """

    encoder: str
    limit: int
    length: int
    cut_after: str
    lost: str


@dataclass(frozen=True)
class UnknownText:
    """What an encoder has no token for, and reads "unknown" in its place.

    Args:
        encoder: "T5" or "CLIP".
        text: the letters or words, in order, each once, with spaces between.
    """

    encoder: str
    text: str


class PromptTokenizer:
    """One encoder's tokenizer at that encoder's length; may be shared between threads.

    Args:
        encoder: "T5" or "CLIP", for messages.
        tokenizer: the encoder's own.
        limit: tokens that every prompt is padded or cut to.
        vocabulary_size: embeddings that the encoder has.
        repairs_text: whether prompts are cleaned by ftfy before they are read, as CLIP's own tokenizer does it: curly quotes,
            full-width forms, ligatures and wrongly decoded letters become plain ones. T5's tokenizer normalises by itself.

    Raises:
        CheckpointError: the tokenizer does not belong to the encoder, or knows no words.
    """

    def __init__(
        self,
        encoder: str,
        tokenizer: T5Tokenizer | CLIPTokenizer,
        limit: int,
        vocabulary_size: int,
        *,
        repairs_text: bool = False,
    ) -> None:
        highest = max(tokenizer.get_vocab().values())
        if highest >= vocabulary_size:
            raise CheckpointError(
                f"{encoder}'s tokenizer has ids up to {highest}, its encoder only {vocabulary_size} embeddings"
            )
        if tokenizer.unk_token_id in tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
            raise CheckpointError(
                f"{encoder}'s tokenizer does not know plain English words: its vocabulary is incomplete or of another kind"
            )
        self._encoder, self._tokenizer, self.limit = encoder, tokenizer, limit
        # A fast tokenizer keeps its truncation and padding settings in itself and refuses a second borrower.
        self._lock = threading.Lock()
        # Taken after the probe, which leaves neither truncation nor padding of an earlier call in the tokenizer.
        self._repairs_text = repairs_text
        repair = f"ftfy {ftfy.__version__}, " if repairs_text else ""
        self.definition: str = f"{repair}{tokenizer.backend_tokenizer.to_str()}"
        """All that decides its answers, as text."""

    @property
    def end_id(self) -> int:
        """The id that ends a text."""
        return int(self._tokenizer.eos_token_id)

    def padding_of(self, ids: Tensor) -> int:
        """How many of the ids [1, limit] of a prompt, at the end, are padding."""
        is_text = (ids[0] != self._tokenizer.pad_token_id).nonzero()
        return ids.shape[1] - (int(is_text.max()) + 1 if len(is_text) else 0)

    def tokenize(self, prompt: str) -> tuple[Tensor, Truncation | None, UnknownText | None]:
        """Turn a prompt into ids.

        Args:
            prompt: any text that is valid Unicode.

        Returns:
            Ids [1, limit], padded; what was cut, if anything was; and what the encoder does not know, of what it read. Both
            are told of the prompt as the encoder reads it.
        """
        prompt = ftfy.fix_text(prompt) if self._repairs_text else prompt
        with self._lock:
            length = len(self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
            kept = self._tokenizer(
                prompt,
                truncation=True,
                max_length=self.limit,
                padding="max_length",
                return_offsets_mapping=True,
                return_tensors="pt",
            )
        ids: Tensor = kept["input_ids"]
        unknown = self._unknown(prompt, ids[0], kept["offset_mapping"][0])
        if length <= self.limit:
            return ids, None, unknown
        # Markers and padding have the offsets (0, 0).
        end = int(kept["offset_mapping"].max())
        return ids, Truncation(self._encoder, self.limit, length, prompt[:end][-40:], prompt[end:]), unknown

    def _unknown(self, prompt: str, ids: Tensor, offsets: Tensor) -> UnknownText | None:
        """What was read as unknown; CLIP spells every text in bytes, and its "unknown" is the mark that ends a text."""
        if self._tokenizer.unk_token_id in (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id):
            return None
        spans = offsets[ids == self._tokenizer.unk_token_id].tolist()
        text = " ".join(dict.fromkeys(prompt[start:end] for start, end in spans))
        return UnknownText(self._encoder, text) if spans else None


def load_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Load T5's tokenizer from a local folder.

    Raises:
        MissingFileError: its files are not there; says which.
        CheckpointError: they cannot be read.
    """
    from transformers import T5Tokenizer

    require_files(folder, "T5 tokenizer", T5_FILES)
    try:
        # From the folder: T5Tokenizer(vocab_file=…) would give a vocabulary of nothing but special tokens.
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer(_PROBE)  # What its settings say wrong shows when it is used.
    except Exception as error:  # of any type: the tokenizers library lets through whatever a foreign file makes it raise
        raise CheckpointError(f"T5 tokenizer in {folder} cannot be loaded: {short_reason(error)}") from error
    return tokenizer


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load CLIP's tokenizer from a local folder.

    Raises:
        MissingFileError: its files are not there; says which.
        CheckpointError: they cannot be read.
    """
    from transformers import CLIPTokenizer

    require_files(folder, "CLIP tokenizer", CLIP_FILES)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer(_PROBE)  # What its settings say wrong shows when it is used.
    except Exception as error:  # of any type: the tokenizers library lets through whatever a foreign file makes it raise
        raise CheckpointError(f"CLIP tokenizer in {folder} cannot be loaded: {short_reason(error)}") from error
    return tokenizer
