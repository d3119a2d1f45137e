"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from uso_engine.api.result import GenerationResult

from .engine_state import EngineState
from .request_record import RequestRecord

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        state: the engine, whose statistics are read when they are asked for.
        held_bytes: bytes of bodies that are held.
        waiting: requests of fal's queue that wait or run.
        gpu_memory: bytes of GPU memory in use and in all; empty where there is no GPU.
    """

    def __init__(
        self,
        state: EngineState,
        held_bytes: Callable[[], int],
        waiting: Callable[[], int],
        gpu_memory: Callable[[], dict[str, int]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("uso_requests", "Requests that have ended.", ["dialect", "outcome"], registry=self._registry)
        self._seconds = Histogram(
            "uso_request_seconds",
            "Seconds of a request that makes images.",
            ["dialect"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "uso_stage_seconds", "Seconds of each stage of a generation.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self._images = Counter("uso_images", "Images made.", ["withheld"], registry=self._registry)
        self._registry.register(_EngineCollector(state, gpu_memory))
        for name, text, value in (
            ("uso_body_bytes", "Bytes of request bodies that are held.", held_bytes),
            ("uso_waiting_requests", "Requests of the durable queue that wait or run.", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def observe_request(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.dialect or "none", record.outcome).inc()
        if record.dialect:
            self._seconds.labels(record.dialect).observe(record.seconds)

    def observe_result(self, result: GenerationResult) -> None:
        """Count images that were made."""
        for stage, seconds in result.timings.items():
            self._stages.labels(stage).observe(seconds)
        withheld = sum(result.has_nsfw_concepts)
        self._images.labels("true").inc(withheld)
        self._images.labels("false").inc(len(result.images) - withheld)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own statistics, read at every scrape."""

    def __init__(self, state: EngineState, gpu_memory: Callable[[], dict[str, int]]) -> None:
        self._state, self._gpu_memory = state, gpu_memory

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("uso_ready", "1 while requests are taken.")
        ready.add_metric([], float(self._state.phase == "ready"))
        yield ready
        if self._state.engine is None:
            return
        found = self._state.engine.statistics()
        for name, text, value in (
            ("uso_engine_queued", "Requests that have not taken a step.", found.queued),
            ("uso_engine_running", "Requests that have taken a step and have not ended.", found.running),
            ("uso_engine_queued_bytes", "Bytes of opened pictures that requests hold.", found.queued_bytes),
            ("uso_engine_step_tokens", "Tokens of the last step.", found.tokens_in_step),
            ("uso_engine_step_requests", "Requests of the last step.", found.requests_in_step),
            ("uso_engine_occupancy", "Mean requests of a step.", found.occupancy),
            ("uso_engine_graph_bytes", "GPU memory of the steps that are kept as CUDA graphs.", found.graphs.held_bytes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("uso_engine_steps", "Denoising steps.", found.steps),
            ("uso_engine_tokens", "Transformer tokens, summed over steps.", found.tokens),
            ("uso_engine_batches_formed", "Steps that formed their batch anew.", found.batches_formed),
            ("uso_engine_memory_retries", "Steps that were taken again because memory ran out.", found.memory_retries),
            ("uso_engine_graph_captures", "Steps that were captured as CUDA graphs.", found.graphs.captured),
            ("uso_engine_graph_replays", "Steps that a CUDA graph computed.", found.graphs.replayed),
            ("uso_engine_graph_failures", "Kinds of steps that could not be captured.", len(found.graphs.failures)),
        ):
            yield CounterMetricFamily(name, text, value=value)
        outcomes = CounterMetricFamily("uso_engine_outcomes", "How the engine's requests ended.", labels=["outcome"])
        for outcome, count in found.outcomes.items():
            outcomes.add_metric([outcome], count)
        yield outcomes
        memory = GaugeMetricFamily("uso_gpu_memory_bytes", "GPU memory.", labels=["kind"])
        for kind, count in self._gpu_memory().items():
            memory.add_metric([kind], count)
        yield memory
        yield from self._caches()

    def _caches(self) -> Iterator[Metric]:
        assert self._state.engine is not None
        caches = self._state.engine.statistics().caches
        lookups = CounterMetricFamily("uso_cache_lookups", "Lookups in the condition caches.", labels=["cache", "result"])
        held = GaugeMetricFamily("uso_cache_bytes", "Bytes that the condition caches hold.", labels=["cache"])
        for name, cache in caches.items():
            lookups.add_metric([name, "hit"], cache.hits)
            lookups.add_metric([name, "miss"], cache.misses)
            held.add_metric([name], cache.size_bytes)
        yield lookups
        yield held
