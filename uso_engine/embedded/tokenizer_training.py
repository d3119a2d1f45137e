"""Train uso-tiny's two tokenizers and write them in the layout that the real ones are read from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer

from uso_engine.embedded.vocabulary import LETTERS, PUNCTUATION

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
# Which stretches of text byte pairs may be merged within: contractions, runs of letters, single digits, runs of anything else.
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_t5_tokenizer(folder: Path, texts: Sequence[str], *, least_count: int, subwords: int) -> int:
    """Make a unigram tokenizer of T5's kind: pieces that begin a word start with ▁, case matters, `</s>` ends the text.

    Instead of fitting the pieces by expectation maximisation, whose pruning splits even "a" on so small a corpus, every word
    that occurs often enough is a piece with its log frequency. Common letter groups of words and every printable ASCII and
    Western European character stand below them, so only other scripts become `<unk>`, as with T5's own.

    Args:
        folder: where tokenizer.json and tokenizer_config.json go.
        texts: what to count words in.
        least_count: occurrences that make a word a piece.
        subwords: letter groups of two to four characters to add.

    Returns:
        The number of pieces, the three special tokens included.
    """
    counts = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text))
    words = sorted(word for word, count in counts.items() if count >= least_count)
    total = sum(counts[word] for word in words)
    scores = {f"▁{word}": math.log(counts[word] / total) for word in words}
    # Far below any word: a word is never put together from groups, nor a group from single characters.
    rarest = min(scores.values())
    for group in _letter_groups(words, subwords):
        scores.setdefault(group, rarest - 2)
    for character in ["▁", *map(chr, range(0x21, 0x7F)), *LETTERS, *PUNCTUATION]:
        scores.setdefault(character, rarest - 4)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, round(score, 3)) for piece, score in scores.items())]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": 512,
    }
    _write(folder, tokenizer, settings)
    return len(pieces)


def _letter_groups(words: Sequence[str], count: int) -> list[str]:
    """The groups of two to four letters that save most characters over the words, at a word's beginning marked with ▁."""
    savings: Counter[str] = Counter()
    for word in words:
        marked = f"▁{word.lower()}"
        for length in (2, 3, 4):
            groups = {marked[start : start + length] for start in range(len(marked) - length + 1)}
            savings.update(dict.fromkeys(groups, length - 1))
    ranked = sorted(savings, key=lambda group: (-savings[group], group))
    return ranked[:count]


def write_clip_tokenizer(folder: Path, texts: Sequence[str], merges: int) -> int:
    """Train a byte-pair tokenizer of CLIP's kind: lower case, `</w>` at the end of a word, the two markers last.

    Args:
        folder: where tokenizer.json and tokenizer_config.json go.
        texts: what to train on.
        merges: pairs to merge at most.

    Returns:
        The number of tokens: 256 bytes, 256 bytes that end a word, the merged pairs, two markers.
    """
    trained = _clip_pipeline(BPE(end_of_word_suffix="</w>"))
    # The trainer counts the bytes it saw among its tokens, so the merges are asked for generously and cut.
    trainer = BpeTrainer(
        vocab_size=512 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    pairs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]][:merges]
    # Rebuilt with the markers at the end: a CLIP text encoder may look for the end of text as the highest id.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in pairs), _BEGIN, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = _clip_pipeline(BPE(vocabulary, pairs, end_of_word_suffix="</w>", unk_token=_END))
    tokenizer.add_special_tokens([AddedToken(_BEGIN, special=True), AddedToken(_END, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, vocabulary[_END]), (_BEGIN, vocabulary[_BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": _BEGIN,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
        "model_max_length": 77,
    }
    _write(folder, tokenizer, settings)
    return len(vocabulary)


def _clip_pipeline(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(folder: Path, tokenizer: Tokenizer, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str(pretty=False))
    (folder / "tokenizer.json").write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
