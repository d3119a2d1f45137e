"""What can go wrong in the world, as types a caller can tell apart.

A caller's own mistake is a ``ValueError``; these are for missing files, foreign checkpoints, unreadable images, failed
downloads and machines that lack what was asked for. The two that a caller can both cause and meet (a bad configuration, a bad
image) are both.
"""


class USOError(Exception):
    """Base of every error this engine raises about the world rather than about an argument."""


class ConfigError(USOError, ValueError):
    """A configuration that cannot be used: an unknown key, a wrong type, a value out of range."""


class MissingFileError(USOError, FileNotFoundError):
    """A file or folder that the configuration names is not there; the message says which and how to get it."""


class CheckpointError(USOError):
    """A weight file that is truncated, foreign, incomplete, or does not fit the model; the message lists the keys."""


class LoRAError(CheckpointError):
    """A LoRA file that cannot be merged: other layers, wrong shapes, not-a-number values, an unknown key style."""


class ImageError(USOError, ValueError):
    """An input image that cannot be used: not an image, truncated, too large, of a refused format."""


class ImageTypeError(ImageError, TypeError):
    """Something of a type that pictures do not have."""


class FetchError(USOError):
    """A URL that could not be read within its limits."""


class PromptError(USOError, ValueError):
    """A prompt that cannot be encoded."""


class BackendError(USOError):
    """Something was asked for by name (an attention backend, a precision tier, a device) that this machine cannot run."""


class ParallelError(USOError):
    """The processes that compute a step together are no longer complete, or do not fit; the engine cannot go on."""


class MemoryBudgetError(USOError):
    """An engine or a request needs more GPU memory than ``memory_budget_gib`` allows; the message says what and how much."""


class DeviceMemoryError(USOError):
    """Memory ran out while a request was computed; the message says where and what would help."""


class NumericsError(USOError, ValueError):
    """Latents or pixels became infinite or not a number; the message says in which stage and what to try."""


class SafetyError(USOError):
    """The safety checker could not run; its images are withheld."""


class OutputError(USOError):
    """A result could not be written; nothing half-written is left behind."""


class EngineClosedError(USOError):
    """The engine was closed; its weights are gone."""


class EngineDrainingError(USOError):
    """The engine finishes what it has and accepts no more requests."""


class EngineDeadError(USOError):
    """The thread that computes has failed, and with it every request; the cause says why. Only a new engine goes on."""


class QueueFullError(USOError):
    """The engine has as many requests as it may hold; nothing of this one was begun.

    Args:
        bound: name of the setting that was reached, as under ``[queue]``.
        limit: its value.
        value: what it would be with this request.
        retry_after_s: when there is likely to be room.
    """

    def __init__(self, bound: str, limit: float, value: float, retry_after_s: float) -> None:
        super().__init__(
            f"the queue is full: queue.{bound} is {limit:g}, with this request it would be {value:g}; "
            f"try again in {retry_after_s:.0f} s"
        )
        self.bound, self.limit, self.value, self.retry_after_s = bound, limit, value, retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # An exception is pickled with its message as the only argument, where nothing else is said.
        return type(self), (self.bound, self.limit, self.value, self.retry_after_s)


class RequestTimeoutError(USOError, TimeoutError):
    """A request was not done, or not begun, in the time that it had; the message says which bound."""


class RequestCancelledError(USOError):
    """A request was cancelled by whoever made it."""


class GenerationCancelled(USOError):
    """A caller stopped a generation from ``on_step``."""
