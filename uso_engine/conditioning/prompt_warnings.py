"""What did not reach the encoders of a prompt, in sentences.

T5 gives the transformer one vector per token and usually reads 512 tokens; CLIP gives one vector for the whole prompt and reads
77. So a long prompt is usually cut for CLIP alone, and a sentence about one encoder has to say what the other one read.
"""

from __future__ import annotations

from collections.abc import Sequence

from uso_engine.conditioning.prompt_tokenizer import Truncation, UnknownText

_OTHER = {"T5": "CLIP", "CLIP": "T5"}
_SHOWN = 40


def prompt_warnings(truncated: Sequence[Truncation], unknown: Sequence[UnknownText], what: str) -> tuple[str, ...]:
    """Say what was cut for which encoder and whether the other one read it, and what an encoder has no token for.

    Args:
        truncated: of one prompt.
        unknown: of the same prompt.
        what: what the text is called: "the prompt", "the negative prompt".

    Returns:
        One sentence for each entry.
    """
    lost = {cut.encoder: len(cut.lost) for cut in truncated}
    return (*(_cut(cut, lost, what) for cut in truncated), *(_not_known(entry, what) for entry in unknown))


def _cut(cut: Truncation, lost: dict[str, int], what: str) -> str:
    other = _OTHER.get(cut.encoder, "the other encoder")
    if other not in lost:
        read = f"{other} read all of it"
    elif lost[other] < lost[cut.encoder]:
        read = f"{other} read further, to a limit of its own"
    else:
        read = "no encoder read what follows"
    name = cut.encoder
    return f"{name} takes {cut.limit} tokens, {what} has {cut.length}: for {name} cut after '…{cut.cut_after}'; {read}"


def _not_known(entry: UnknownText, what: str) -> str:
    shown = entry.text if len(entry.text) <= _SHOWN else f"{entry.text[:_SHOWN]}…"
    return f"{entry.encoder} has no token for '{shown}' in {what} and reads 'unknown' in its place; write it in other words"
