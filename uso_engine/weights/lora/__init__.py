"""LoRAs: files of every common key style and kind of adapter, and the changes of weights that they hold."""

from .low_rank import LoRA, LoRASet, LowRankUpdate
from .reading import parse_lora, read_lora

__all__ = ["LoRA", "LoRASet", "LowRankUpdate", "parse_lora", "read_lora"]
