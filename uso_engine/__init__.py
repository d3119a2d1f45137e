"""uso_engine: GPU inference for USO image generation.

    from uso_engine import USOEngine
    engine = USOEngine.from_config("uso-tiny")
    engine.generate(prompt="…", images=["content.png", "style.png"], seed=7).images[0].save("out.png")

Names are imported when they are first used, so that importing the package, checking a request or asking for help does not
import torch.
"""

from __future__ import annotations

from importlib import import_module

from .version import VERSION as __version__

# typing's constant under its own name: importing typing would be most of the time in which Ctrl-C meets no handler yet.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api.request import GenerationRequest, request_model
    from .api.research import ResearchOptions
    from .api.result import GenerationResult
    from .async_engine import AsyncUSOEngine
    from .config import EngineConfig, list_configs, load_config
    from .engine import USOEngine
    from .errors import GenerationCancelled, USOError
    from .imaging.open import ImageLimits
    from .imaging.store import FileStore
    from .loading.torchrun import follow_if_not_first
    from .sampling.step import Step

__all__ = [
    "AsyncUSOEngine",
    "EngineConfig",
    "FileStore",
    "GenerationCancelled",
    "GenerationRequest",
    "GenerationResult",
    "ImageLimits",
    "ResearchOptions",
    "Step",
    "USOEngine",
    "USOError",
    "__version__",
    "follow_if_not_first",
    "list_configs",
    "load_config",
    "request_model",
]
_HOMES = {
    "AsyncUSOEngine": "async_engine",
    "EngineConfig": "config",
    "list_configs": "config",
    "load_config": "config",
    "USOEngine": "engine",
    "GenerationCancelled": "errors",
    "USOError": "errors",
    "FileStore": "imaging.store",
    "GenerationRequest": "api.request",
    "ImageLimits": "imaging.open",
    "follow_if_not_first": "loading.torchrun",
    "request_model": "api.request",
    "ResearchOptions": "api.research",
    "GenerationResult": "api.result",
    "Step": "sampling.step",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
