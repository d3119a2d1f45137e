"""The load generator's traces at the size of a deployment; what is asked for is drawn by popularity."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.serving.arrivals import SIZES, Arrival
from benchmarks.step.prediction import predicted_step_ms
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Tokens
from uso_engine.serving.ray.demand import Demand

# What the trace's kinds are on FLUX.1-dev: side in pixels and steps. Shares and references are the trace's own.
SCALED = {"small": (512, 20), "medium": (768, 28), "large": (1024, 28)}
# Seconds of an H100 for what is encoded once per distinct input, and for each result. Assumed, not measured: T5-XXL and CLIP of
# 512 tokens, the autoencoder of 512 pixels, SigLIP of one image; decoding is in proportion to pixels.
ENCODING_S = {"prompt": 0.06, "content": 0.05, "style": 0.03}
DECODING_S = 0.12
TEXT, STYLE, CONTENT = 512, 192, 1024


@dataclass(frozen=True)
class SimulatedRequest:
    """A request of a trace.

    Args:
        at_s: when it comes.
        kind: "small", "medium" or "large".
        demand: what the router sees.
        compute_s: of a GPU, encoding left out.
        encoding_s: of a GPU, by condition, where that is not cached.
    """

    at_s: float
    kind: str
    demand: Demand
    compute_s: float
    encoding_s: dict[str, float]


def step_s(kind: str, references: int) -> tuple[int, float]:
    """Tokens of a kind, and the seconds that one of its steps is predicted to take on an H100."""
    side = SCALED[kind][0]
    tokens = Tokens(
        text=TEXT, style=STYLE * max(0, references - 1), image=(side // 16) ** 2, content=CONTENT * min(1, references)
    )
    return tokens.all, 1e-3 * sum(predicted_step_ms(TransformerParams(), tokens).values())


def mean_compute_s() -> float:
    """Seconds of a GPU for a request of the mixture, encoding left out."""
    return sum(size.share * compute_s(size.name, size.references) for size in SIZES)


def compute_s(kind: str, references: int) -> float:
    """Seconds of a GPU for the steps and the decoding of a request."""
    side, steps = SCALED[kind]
    return steps * step_s(kind, references)[1] + DECODING_S * (side / 1024) ** 2


def simulated(trace: Sequence[Arrival], *, styles: int, contents: int, prompts: int, seed: int) -> list[SimulatedRequest]:
    """The requests of a trace.

    Args:
        trace: of the load generator.
        styles: different ones, the n-th asked for in proportion to 1 / n.
        contents: likewise.
        prompts: likewise.
        seed: of what is asked for.
    """
    drawn = random.Random(seed)
    popular = {"style": _Popular(styles), "content": _Popular(contents), "prompt": _Popular(prompts)}
    known = {size.name: (step_s(size.name, size.references)[0], compute_s(size.name, size.references)) for size in SIZES}
    found = []
    for arrival in trace:
        kind, references = arrival.size.name, arrival.size.references
        tokens, seconds = known[kind]
        prompt = f"prompt {popular['prompt'].draw(drawn)}"
        pictures = [f"content {popular['content'].draw(drawn)}"] if references else []
        pictures += [f"style {popular['style'].draw(drawn)}" for _ in range(references - 1)]
        encoding = {key: ENCODING_S[key.split()[0]] for key in (prompt, *pictures)}
        demand = Demand(str(arrival.seed), tokens * SCALED[kind][1], frozenset({prompt}), frozenset(pictures))
        found.append(SimulatedRequest(arrival.at_s, kind, demand, seconds, encoding))
    return found


class _Popular:
    """Numbers from 0, the n-th drawn in proportion to 1 / (n + 1)."""

    def __init__(self, count: int) -> None:
        self._sums = list(accumulate(1 / (number + 1) for number in range(count)))

    def draw(self, drawn: random.Random) -> int:
        return bisect_left(self._sums, drawn.random() * self._sums[-1])
