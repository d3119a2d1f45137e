"""What a request asks of a replica: work in tokens, and conditions that the replica may have encoded already."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from uso_engine.api.request import GenerationRequest
from uso_engine.config import EngineConfig

PIXELS_OF_A_TOKEN = 16 * 16
LEVELS_OF_STYLE = 3


@dataclass(frozen=True)
class Demand:
    """One request, as the router sees it.

    Args:
        id: of the request; another run of it has the same one.
        work: transformer tokens, summed over its steps; at least 1.
        prompts: keys of its prompts.
        pictures: keys of its content and style images.
        loras: key of its own LoRAs; empty for the configuration's.
        identity: what its first run was computed with, where it is run again: it must not give another picture.
        avoid: replicas that it is not to go to, such as the one that died with it.

    Raises:
        ValueError: no work.
    """

    id: str
    work: int
    prompts: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()
    loras: str = ""
    identity: str | None = None
    avoid: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.work < 1:
            raise ValueError(f"expected work of at least 1 token, got {self.work}")

    @property
    def keys(self) -> frozenset[str]:
        """Everything that a replica may have encoded."""
        return self.prompts | self.pictures


def demand_of(identifier: str, request: GenerationRequest, config: EngineConfig) -> Demand:
    """What a request asks for, without opening its pictures.

    Args:
        identifier: of the request.
        request: within the server's limits.
        config: of the engines.

    Returns:
        Its demand; the sizes of pictures that nobody has opened are taken at their bounds.
    """
    prompts = [request.prompt, *([request.negative_prompt] if request.negative_prompt else [])]
    pictures = {
        f"{'style' if place else f'content {request.content_long_side}'} {_digest(picture)}"
        for place, picture in enumerate(request.image_urls)
        if picture is not None
    }
    return Demand(
        identifier,
        work=work_of(request, config),
        prompts=frozenset(f"prompt {_digest(prompt)}" for prompt in prompts),
        pictures=frozenset(pictures),
    )


def work_of(request: GenerationRequest, config: EngineConfig) -> int:
    """Transformer tokens of a request, summed over steps and images; a negative prompt doubles them."""
    side = request.content_long_side
    # With `keep_size` only the content image knows the size; its long side at most.
    width, height = (2 * side, 2 * side) if request.keep_size else request.resolved_size()
    text = 0 if config.t5 is None else config.t5.max_length
    style = 0 if config.projector is None else LEVELS_OF_STYLE * config.projector.style_tokens * len(request.style_images)
    content = 0 if request.content_image is None else side * side // PIXELS_OF_A_TOKEN
    tokens = text + style + content + width * height // PIXELS_OF_A_TOKEN
    sequences = 2 if request.negative_prompt and request.true_cfg_scale != 1 else 1
    return max(1, tokens * sequences * request.num_images * request.num_inference_steps)


def _digest(source: object) -> str:
    """Of a prompt or a picture as it was given: the same URL is the same picture to the router."""
    data = source if isinstance(source, bytes) else str(source).encode()
    return hashlib.sha256(data).hexdigest()[:16]
