"""Prompt to embeddings: T5 gives one vector per token, CLIP one vector for the whole prompt."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uso_engine.conditioning.cache import hash_text, tensor_bytes
from uso_engine.conditioning.offloadable_part import OffloadablePart, attention_working_bytes
from uso_engine.conditioning.pretrained import fingerprint
from uso_engine.conditioning.prompt_tokenizer import (
    PromptTokenizer,
    Truncation,
    UnknownText,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from uso_engine.conditioning.prompt_warnings import prompt_warnings
from uso_engine.conditioning.storage import load_conditioning, save_conditioning
from uso_engine.conditioning.text_models import load_clip, load_t5, tokenizer_folder
from uso_engine.conditioning.text_padding import Groups, MergedText, check_padding, group_padding, merge_padding
from uso_engine.errors import CheckpointError, PromptError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

logger = logging.getLogger(__name__)

_KIND = "text embedding"


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """What the transformer sees of a prompt.

    Args:
        tokens: T5's last hidden state, [L_txt, context_in_dim].
        pooled: CLIP's pooled output, [vec_in_dim].
        prompt_hash: hash of the prompt and of the encoders that read it.
        encoder: identity of those encoders.
        truncated: one entry for each encoder that could not take the whole prompt.
        unknown: one entry for each encoder that has no token for some of what it read.
        padding: how many of the tokens, at the end, are T5's padding; None where nobody knows.
    """

    tokens: Tensor
    pooled: Tensor
    prompt_hash: str
    encoder: str
    truncated: tuple[Truncation, ...] = ()
    unknown: tuple[UnknownText, ...] = ()
    padding: int | None = None

    def warnings(self, what: str = "the prompt") -> tuple[str, ...]:
        """What did not reach the encoders, one sentence each; `what` is what the text is called."""
        return prompt_warnings(self.truncated, self.unknown, what)

    @property
    def size_bytes(self) -> int:
        """Bytes of both tensors."""
        return tensor_bytes(self.tokens) + tensor_bytes(self.pooled)

    def merged(self) -> MergedText:
        """The tokens with their padding merged; ValueError where nobody knows what is padding."""
        return merge_padding(self.tokens, check_padding(self.padding), self._groups)

    @cached_property
    def _groups(self) -> Groups:
        return group_padding(self.tokens, check_padding(self.padding))

    def save(self, path: str | Path) -> None:
        """Write the embedding to a safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        metadata = {
            "prompt_hash": self.prompt_hash,
            "encoder": self.encoder,
            "truncated": json.dumps([asdict(entry) for entry in self.truncated]),
            "unknown": json.dumps([asdict(entry) for entry in self.unknown]),
            "padding": json.dumps(self.padding),
        }
        save_conditioning(Path(path), _KIND, {"tokens": self.tokens, "pooled": self.pooled}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, token_width: int, pooled_width: int, encoder: str | None = None) -> TextEmbedding:
        """Read an embedding that ``save`` wrote.

        Args:
            path: the file.
            token_width: the transformer's context_in_dim.
            pooled_width: the transformer's vec_in_dim.
            encoder: identity of the encoders in use; another one in the file is logged as a warning, for the widths fit.

        Raises:
            MissingFileError: no such file.
            CheckpointError: another kind of file, or made for a model of other widths.
        """
        path = Path(path)
        tensors, metadata = load_conditioning(path, _KIND, ("tokens", "pooled"))
        tokens, pooled = tensors["tokens"], tensors["pooled"]
        found = (tuple(tokens.shape[1:]), tuple(pooled.shape))
        if tokens.ndim != 2 or found != ((token_width,), (pooled_width,)):
            raise CheckpointError(
                f"{path} holds a text embedding of shapes {list(tokens.shape)} and {list(pooled.shape)}; "
                f"this model takes [tokens, {token_width}] and [{pooled_width}]"
            )
        made_by = metadata.get("encoder", "")
        if encoder is not None and made_by != encoder:
            logger.warning("%s was made by other text encoders (%s) than the ones in use (%s)", path, made_by, encoder)
        try:
            truncated = tuple(Truncation(**entry) for entry in json.loads(metadata.get("truncated", "[]")))
            unknown = tuple(UnknownText(**entry) for entry in json.loads(metadata.get("unknown", "[]")))
            padding = json.loads(metadata.get("padding", "null"))
            if padding is not None and not (type(padding) is int and 0 <= padding <= len(tokens)):
                raise ValueError(f"padding must be from 0 to {len(tokens)} rows, got {padding!r}")
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} has an unreadable record of what was cut and filled up: {error}") from error
        return cls(tokens, pooled, metadata.get("prompt_hash", ""), made_by, truncated, unknown, padding)


class TextEncoders:
    """T5 and CLIP with their own tokenizers.

    Args:
        t5: in evaluation mode, on the device it is to run on.
        t5_tokenizer: its tokenizer.
        clip: in evaluation mode, on the device it is to run on.
        clip_tokenizer: its tokenizer.
        t5_max_length: L_txt, the tokens every prompt is padded or cut to.
        clip_max_length: the same for CLIP.

    Raises:
        ValueError: a length that the encoder cannot take.
        CheckpointError: a tokenizer that does not belong to its encoder.
    """

    def __init__(
        self,
        t5: T5EncoderModel,
        t5_tokenizer: T5Tokenizer,
        clip: CLIPTextModel,
        clip_tokenizer: CLIPTokenizer,
        *,
        t5_max_length: int = 512,
        clip_max_length: int = 77,
    ) -> None:
        positions = int(clip.config.max_position_embeddings)
        if t5_max_length < 2:
            raise ValueError(f"t5_max_length must be at least 2, got {t5_max_length}")
        if not 3 <= clip_max_length <= positions:
            raise ValueError(f"clip_max_length must be from 3 to {positions}, CLIP's positions, got {clip_max_length}")
        self._t5, self._clip = t5, clip
        self._t5_words = PromptTokenizer("T5", t5_tokenizer, t5_max_length, int(t5.config.vocab_size))
        self._clip_words = PromptTokenizer(
            "CLIP", clip_tokenizer, clip_max_length, int(clip.config.vocab_size), repairs_text=True
        )
        # 2 in an old CLIP configuration stands for "the highest id"; anything else has to be the id that the tokenizer writes,
        # or the pooled output would silently be that of the first token.
        if clip.config.eos_token_id not in (2, self._clip_words.end_id):
            raise CheckpointError(
                f"CLIP's configuration has end-of-text id {clip.config.eos_token_id}, its tokenizer {self._clip_words.end_id}"
            )
        self.token_width = int(t5.config.d_model)
        self.pooled_width = int(clip.config.hidden_size)
        words = (self._t5_words, self._clip_words)
        self.identity = fingerprint([t5, clip], *(f"{entry.limit} {entry.definition}" for entry in words))
        self._t5_part = OffloadablePart("T5", [t5], list(t5.encoder.block))
        # Some releases of transformers 5 hold the layers one level deeper.
        tower = getattr(clip, "text_model", clip)
        self._clip_part = OffloadablePart(
            "CLIP", [clip], list(tower.encoder.layers), _clip_working_bytes(clip, clip_max_length)
        )

    @classmethod
    def from_folders(
        cls,
        t5: str | Path,
        clip: str | Path,
        *,
        t5_tokenizer: str | Path | None = None,
        clip_tokenizer: str | Path | None = None,
        t5_max_length: int = 512,
        clip_max_length: int = 77,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TextEncoders:
        """Load both encoders from local folders in the Hugging Face layout, or from single files.

        Args:
            t5: folder of the T5 encoder (or of a whole T5), or a file that holds it.
            clip: folder of the CLIP text model (or of a whole CLIP), or a file that holds it.
            t5_tokenizer: folder of T5's tokenizer where it is another one; beside a single file it is looked for.
            clip_tokenizer: folder of CLIP's tokenizer where it is another one; likewise.
            t5_max_length: tokens per prompt for T5.
            clip_max_length: tokens per prompt for CLIP.
            device: where the encoders run.
            dtype: of the weights and of the result; the authors use bfloat16.

        Raises:
            MissingFileError: a file is not there; says which.
            CheckpointError: files that are not what the configuration says they are.
        """
        t5, clip = Path(t5), Path(clip)
        t5_words = load_t5_tokenizer(tokenizer_folder("T5", t5, t5_tokenizer))
        clip_words = load_clip_tokenizer(tokenizer_folder("CLIP", clip, clip_tokenizer))
        t5_model, clip_model = load_t5(t5, dtype, device), load_clip(clip, dtype, device)
        return cls(t5_model, t5_words, clip_model, clip_words, t5_max_length=t5_max_length, clip_max_length=clip_max_length)

    @property
    def t5(self) -> T5EncoderModel:
        """The T5 encoder, whose matrices may be replaced by 8-bit ones."""
        return self._t5

    @property
    def parts(self) -> tuple[OffloadablePart, ...]:
        """Both encoders, as parts of a memory plan."""
        # T5 may have been quantised since.
        self._t5_part.working_bytes = _t5_working_bytes(self._t5, self._t5_words.limit)
        return self._t5_part, self._clip_part

    def to(self, device: torch.device | str) -> TextEncoders:
        """Move both encoders."""
        encoders: tuple[nn.Module, ...] = (self._t5, self._clip)
        for encoder in encoders:
            encoder.to(device)
        return self

    def hash_prompt(self, prompt: str) -> str:
        """Hash a prompt as read by these encoders: the cache's key.

        Raises:
            PromptError: not a string.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt must be a string, got {type(prompt).__name__}")
        return hash_text(prompt, self.identity)

    @torch.no_grad()
    def encode(self, prompt: str) -> TextEmbedding:
        """Embed one prompt.

        T5 sees the prompt padded to its full length without an attention mask, as the authors feed it, so the padding is part
        of the answer. One prompt at a time, so that the answer does not depend on which prompts came together.

        Args:
            prompt: any text; the empty string is legal.

        Returns:
            The embedding, on the encoders' device in their dtype. It says itself where the prompt was cut and what is unknown.

        Raises:
            PromptError: not a string, or text that is not valid Unicode.
        """
        prompt_hash = self.hash_prompt(prompt)
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: half a surrogate pair at character {error.start}") from error
        t5_ids, *t5_lost = self._t5_words.tokenize(prompt)
        clip_ids, *clip_lost = self._clip_words.tokenize(prompt)
        truncated = tuple(entry for entry in (*t5_lost, *clip_lost) if isinstance(entry, Truncation))
        unknown = tuple(entry for entry in (*t5_lost, *clip_lost) if isinstance(entry, UnknownText))
        with self._t5_part.running():
            tokens = self._t5(input_ids=t5_ids.to(self._t5.device), attention_mask=None).last_hidden_state[0]
        with self._clip_part.running():
            pooled = self._clip(input_ids=clip_ids.to(self._clip.device), attention_mask=None).pooler_output[0]
        padding = self._t5_words.padding_of(t5_ids)
        return TextEmbedding(tokens, pooled, prompt_hash, self.identity, truncated, unknown, padding)


def _t5_working_bytes(t5: T5EncoderModel, tokens: int) -> int:
    sizes = t5.config
    layers = [layer for layer in t5.modules() if isinstance(layer, nn.Linear)]
    # Matrices in 8 bits are turned back into 16 for their product, one at a time.
    scratch = 0 if layers else 2 * int(sizes.d_model) * int(sizes.d_ff)
    dtype: torch.dtype = t5.dtype
    return scratch + attention_working_bytes(tokens, int(sizes.num_heads), int(sizes.d_model), int(sizes.d_ff), dtype.itemsize)


def _clip_working_bytes(clip: CLIPTextModel, tokens: int) -> int:
    sizes, dtype = clip.config, clip.dtype
    return attention_working_bytes(
        tokens, int(sizes.num_attention_heads), int(sizes.hidden_size), int(sizes.intermediate_size), dtype.itemsize
    )
