"""What an engine has done so far, counted by whichever thread does it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Counts since the engine was made; the fields are those of `uso_engine.api.statistics.EngineStatistics`."""

    steps: int = 0
    tokens: int = 0
    members: int = 0
    tokens_in_step: int = 0
    requests_in_step: int = 0
    lora_switches: int = 0
    memory_retries: int = 0
    busy_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count_step(self, tokens: int, members: int, seconds: float) -> None:
        """A step of so many tokens was taken by so many requests."""
        self.steps += 1
        self.tokens += tokens
        self.members += members
        self.busy_s += seconds
        self.tokens_in_step, self.requests_in_step = tokens, members

    def count_outcome(self, outcome: str) -> None:
        """A request ended, or was refused."""
        with self._lock:
            self.outcomes[outcome] += 1

    def seconds_for(self, tokens: int) -> float:
        """How long so many tokens of steps take at the rate so far; 1 where nothing is known."""
        return max(1.0, tokens * self.busy_s / self.tokens) if self.tokens else 1.0
