"""Spans of generations, as an exporter of OpenTelemetry's SDK gets them."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image

from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.serving import tracing
from uso_engine.serving.image_call import ImageCall, written_hosted

CALL = ImageCall("hosted", GenerationRequest(prompt="a secret"), 201, written_hosted)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def result() -> GenerationResult:
    image = Image.new("RGB", (32, 16))
    timings = {"queue": 0.5, "denoise": 2.0}
    return GenerationResult((image,), 1, (1,), (False,), "a secret", 32, 16, timings, 7, {})


def test_stages_are_spans_within_the_requests(spans: InMemorySpanExporter) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.generation_span(CALL, "id", {"traceparent": parent}) as span:
        span.done(result())
    queue, denoise, whole = spans.get_finished_spans()
    assert (queue.name, denoise.name, whole.name) == ("queue", "denoise", "generate")
    assert whole.context is not None and f"{whole.context.trace_id:x}" == "af7651916cd43dd8448eb211c80319c"
    assert [span.parent and span.parent.span_id for span in (queue, denoise)] == [whole.context.span_id] * 2
    assert seconds(queue) == 0.5 and seconds(denoise) == 2.0 and denoise.start_time == queue.end_time
    assert whole.attributes is not None and whole.attributes["uso.tokens"] == 7 and "secret" not in whole.to_json()


def seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None and span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_an_error_is_named_without_its_text(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="a secret"), tracing.generation_span(CALL, "id", {}):
        raise ValueError("a secret")
    (span,) = spans.get_finished_spans()
    assert span.status.description == "ValueError" and "secret" not in span.to_json()


def test_without_the_package_there_are_none(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "AVAILABLE", False)
    with tracing.generation_span(CALL, "id", {}) as span:
        span.done(result())
    assert spans.get_finished_spans() == ()
