"""Spans of OpenTelemetry, where its API is installed: one for each generation, its stages within it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from uso_engine.api.result import GenerationResult

from .image_call import ImageCall

try:
    from opentelemetry import propagate, trace

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

_NANOSECONDS = 1_000_000_000


class GenerationSpan:
    """The span of one generation; without OpenTelemetry it is nothing.

    Args:
        call: what is generated.
        request_id: of the HTTP request, or of the queue's.
        headers: of the HTTP request, for the span that it belongs to.
    """

    def __init__(self, call: ImageCall, request_id: str, headers: Mapping[str, str]) -> None:
        if not AVAILABLE:
            return
        self._tracer = trace.get_tracer("uso_engine")
        self._began = time.time_ns()
        attributes: dict[str, str | int] = {
            "uso.dialect": call.dialect,
            "uso.request_id": request_id,
            "uso.images": call.request.num_images,
            "uso.steps": call.request.num_inference_steps,
        }
        context = propagate.extract(headers)
        self._span = self._tracer.start_span("generate", context=context, start_time=self._began, attributes=attributes)

    def done(self, result: GenerationResult) -> None:
        """Add the stages, in their order, and what was made."""
        if not AVAILABLE:
            return
        inside, at = trace.set_span_in_context(self._span), self._began
        for name, seconds in result.timings.items():
            stage = self._tracer.start_span(name, context=inside, start_time=at)
            at += int(seconds * _NANOSECONDS)
            stage.end(end_time=at)
        self._span.set_attributes({"uso.width": result.width, "uso.height": result.height, "uso.tokens": result.tokens_used})

    def failed(self, error: BaseException) -> None:
        """Say what kind of error ended it, and not its text, which may hold what a caller wrote."""
        if AVAILABLE:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))

    def end(self) -> None:
        """End the span."""
        if AVAILABLE:
            self._span.end()


@contextmanager
def generation_span(call: ImageCall, request_id: str, headers: Mapping[str, str]) -> Iterator[GenerationSpan]:
    """A span around a generation; see `GenerationSpan`."""
    span = GenerationSpan(call, request_id, headers)
    try:
        yield span
    except BaseException as error:
        span.failed(error)
        raise
    finally:
        span.end()
