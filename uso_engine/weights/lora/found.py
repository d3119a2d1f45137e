"""What is found in a LoRA file before it is understood: the keys of every layer, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from uso_engine.errors import LoRAError
from uso_engine.weights.files.key_report import bulleted, summarise_keys

from .keys import Role
from .layers import LoRALayer


@dataclass
class FoundLayer:
    """The keys of one layer as they are found, and where it lies in the model."""

    keys: dict[Role, str] = field(default_factory=dict)
    target: LoRALayer | None = None
    style: str = ""
    prefix: str = ""

    @property
    def a_key(self) -> str:
        """One of its keys, for messages."""
        return next(iter(self.keys.values()))


@dataclass
class Findings:
    """What is wrong with a file, by what is wrong, and what was left out."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    text_encoders: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def add(self, problem: str, key: str) -> None:
        """Note a key that cannot be used, and why."""
        self.problems.setdefault(problem, []).append(key)

    def raise_if_any(self, name: str) -> None:
        """Raise one LoRAError that lists every key at fault, if there are any."""
        if self.problems:
            lines = [f"{problem}: {summarise_keys(keys)}" for problem, keys in self.problems.items()]
            raise LoRAError(bulleted(f"{name} cannot be used as a LoRA for this transformer", lines))
