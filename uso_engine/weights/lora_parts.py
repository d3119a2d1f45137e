"""Reading one LoRA key: which layer it belongs to and what it is there, or why it cannot be used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """What a tensor of a LoRA file is to its layer."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"


@dataclass(frozen=True)
class LoRAKey:
    """A key that was understood: the layer's name as the file writes it, and the part."""

    layer: str
    part: Part


_ADAPTER = r"(?:\.[A-Za-z0-9_-]+)?"
"""PEFT puts the adapter's name between: ``lora_A.default.weight``."""

_PARTS = (
    (Part.DOWN, re.compile(rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down){_ADAPTER}\.weight$|\.lora_A$")),
    (Part.UP, re.compile(rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up|up){_ADAPTER}\.weight$|\.lora_B$")),
    (Part.ALPHA, re.compile(r"\.alpha$")),
)

_REFUSED = (
    ("DoRA (a magnitude for every row)", re.compile(r"\.(?:dora_scale|lora_magnitude_vector\b.*|magnitude)$")),
    ("LoKr (Kronecker products)", re.compile(r"\.lokr_\w+$")),
    ("LoHa (Hadamard products)", re.compile(r"\.hada_\w+$")),
    ("OFT (rotations)", re.compile(r"\.(?:oft_\w+|boft_\w+)(?:\.weight)?$")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("IA3", re.compile(r"\.on_input$")),
    ("a convolution's middle part (lora_mid)", re.compile(r"\.lora_mid\.weight$")),
    (
        "a change of a bias (diff_b, lora_B.bias)",
        re.compile(r"\.(?:diff_b|b_norm)$|\.(?:lora_B|lora_up|lora_A|lora_down)\b.*\.bias$"),
    ),
    ("a change of a whole weight (diff, set_weight)", re.compile(r"\.(?:diff|w_norm|set_weight|reshape_weight)$|norm\.scale$")),
)

_TEXT_ENCODERS = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?(?:_\d)?\.|lora_text_encoder|text_model\.|bundle_emb\.|"
    r"lora_prior_te_|cond_stage_model\.)"
)


def parse_key(key: str) -> LoRAKey | None:
    """The layer and part of a key, or None if it has no ending that a LoRA's keys have."""
    for part, pattern in _PARTS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return LoRAKey(key[: match.start()], part)
    return None


def refusal(key: str) -> str | None:
    """The name of the kind of adapter that a key belongs to, if it is one that cannot be merged as a low-rank product."""
    return next((kind for kind, pattern in _REFUSED if pattern.search(key)), None)


def is_text_encoder_key(key: str) -> bool:
    """Whether a key belongs to a text encoder, which a LoRA for images may carry along."""
    return _TEXT_ENCODERS.match(key) is not None
