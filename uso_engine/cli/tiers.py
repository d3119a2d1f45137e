"""The precision tiers as choices of an option; Typer makes choices of enumerations."""

from __future__ import annotations

from enum import StrEnum

from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS, TierName

# mypy knows the members of an enumeration only where they are spelled out, and they are spelled out once, in TIERS.
TierChoice = StrEnum("TierChoice", {name: name for name in TIERS})  # type: ignore[misc]
QuantizedTierChoice = StrEnum("QuantizedTierChoice", {name: name for name in QUANTIZED_TIERS})  # type: ignore[misc]


def chosen_tier(choice: StrEnum) -> TierName:
    """The tier's name that a choice stands for."""
    return next(name for name in TIERS if name == choice)
