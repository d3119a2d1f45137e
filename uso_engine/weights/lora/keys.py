"""Reading one LoRA key: which layer it belongs to and what it is there, or why it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """What a tensor of a LoRA file is to its layer."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    UP_BIAS = "bias of the up matrix"
    MAGNITUDE = "magnitude"
    DIFFERENCE = "difference"
    BIAS_DIFFERENCE = "bias difference"
    KRONECKER_1 = "lokr_w1"
    KRONECKER_1A = "lokr_w1_a"
    KRONECKER_1B = "lokr_w1_b"
    KRONECKER_2 = "lokr_w2"
    KRONECKER_2A = "lokr_w2_a"
    KRONECKER_2B = "lokr_w2_b"
    HADAMARD_1A = "hada_w1_a"
    HADAMARD_1B = "hada_w1_b"
    HADAMARD_2A = "hada_w2_a"
    HADAMARD_2B = "hada_w2_b"
    FACTORS = "IA3 factors"
    ON_INPUT = "on_input"
    PEFT_FACTORS = "ia3_l"
    ROTATIONS = "oft_blocks"
    RESCALE = "rescale"
    GLORA_A1 = "a1"
    GLORA_A2 = "a2"
    GLORA_B1 = "b1"
    GLORA_B2 = "b2"


CHANGES_ALONE = (Role.DIFFERENCE, Role.BIAS_DIFFERENCE, Role.UP_BIAS)
"""Parts that are a change by themselves: where such a tensor is zero, it changes nothing."""


@dataclass(frozen=True)
class LoRAKey:
    """A key that was understood: the layer's name as the file writes it, and the part."""

    layer: str
    part: Role


_ADAPTER = r"(?:\.[A-Za-z0-9_-]+)?"
"""PEFT puts the adapter's name between: ``lora_A.default.weight``."""

_PARTS = (
    (
        Role.DOWN,
        re.compile(rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down){_ADAPTER}\.weight$|\.lora_A$"),
    ),
    (Role.UP, re.compile(rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up|up){_ADAPTER}\.weight$|\.lora_B$")),
    (Role.ALPHA, re.compile(r"\.alpha$")),
    (Role.UP_BIAS, re.compile(rf"\.(?:lora_B|lora_up){_ADAPTER}\.bias$")),
    (Role.MAGNITUDE, re.compile(rf"\.dora_scale$|\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$")),
    (Role.DIFFERENCE, re.compile(r"\.(?:diff|w_norm)$")),
    (Role.BIAS_DIFFERENCE, re.compile(r"\.(?:diff_b|b_norm)$")),
    *((part, re.compile(rf"\.{part.value}{_ADAPTER}$")) for part in Role if part.name.startswith(("KRONECKER", "HADAMARD"))),
    (Role.ON_INPUT, re.compile(r"\.on_input$")),
    (Role.PEFT_FACTORS, re.compile(rf"\.ia3_l{_ADAPTER}$")),
    (Role.ROTATIONS, re.compile(r"\.oft_blocks$")),
    (Role.RESCALE, re.compile(r"\.rescale$")),
    *((part, re.compile(rf"\.{part.value}\.weight$")) for part in Role if part.name.startswith("GLORA")),
)

_REFUSED = (
    ("DoRA with magnitudes of an unknown kind", re.compile(r"\.magnitude$")),
    ("a convolution's middle part (lora_mid, t1, t2)", re.compile(r"\.(?:lora_mid\.weight|lokr_t\w+|hada_t\w+)$")),
    ("LoKr (Kronecker products) with factors that are not known", re.compile(r"\.lokr_\w+$")),
    ("LoHa (Hadamard products) with factors that are not known", re.compile(r"\.hada_\w+$")),
    ("OFT or BOFT of PEFT, whose meaning changed between its versions", re.compile(r"\.(?:oft_\w+|boft_\w+)(?:\.\w+)*$")),
    ("GLoRA with a middle part", re.compile(r"\.bm\.weight$")),
    ("a bias of the down matrix (lora_A.bias)", re.compile(r"\.(?:lora_A|lora_down)\b.*\.bias$")),
    ("a whole new weight (set_weight, norm.scale)", re.compile(r"\.(?:set_weight|reshape_weight)$|_norm\.scale$")),
)

_TEXT_ENCODERS = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?[_.]|text_encoders?(?:_\d)?\.|lora_text_encoder|text_model\.|bundle_emb\.|"
    r"lora_prior_te_|cond_stage_model\.|clip_[lg]\.|t5(?:xxl)?\.)|emb_params$"
)


def parse_key(key: str, *, beside: Collection[str] = ()) -> LoRAKey | None:
    """The layer and part of a key, or None if it has no ending that a LoRA's keys have.

    Args:
        key: of the file.
        beside: all its keys: IA3's factors are called ``weight``, and are IA3's by the ``on_input`` beside them.
    """
    for part, pattern in _PARTS:
        match = pattern.search(key)
        if match and match.start() > 0:
            return LoRAKey(key[: match.start()], part)
    layer = key.removesuffix(".weight")
    return LoRAKey(layer, Role.FACTORS) if layer != key and f"{layer}.on_input" in beside else None


def refusal(key: str) -> str | None:
    """The name of the kind of adapter that a key belongs to, if it is one that is not merged."""
    return next((kind for kind, pattern in _REFUSED if pattern.search(key)), None)


def is_text_encoder_key(key: str) -> bool:
    """Whether a key belongs to a text encoder, or is a learned prompt, which a LoRA for images may carry along."""
    return _TEXT_ENCODERS.match(key) is not None
