"""The CUDA graphs of an engine: which steps get one, how many are kept, and what became of those that could not be captured."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from uso_engine.errors import BackendError
from uso_engine.model.roofline import step_flops
from uso_engine.model.run import Run
from uso_engine.model.transformer import Transformer

from .cuda_capture import CudaCapturing
from .graph_statistics import GraphStatistics
from .host_bound import gpu_ms, host_ms
from .step_graph import CaptureError, Capturing, StepGraph, signature

logger = logging.getLogger(__name__)

GraphMode = Literal["auto", "on", "off"]
MIB = 2**20
MOST_GRAPHS = 16
"""However small they are."""
SEEN_BEFORE_CAPTURE = 2
"""Steps of a signature that are computed without a graph first: a request of one step is none the slower."""
MOST_REMEMBERED = 256


@dataclass
class _Counts:
    captured: int = 0
    replayed: int = 0
    eager: int = 0
    evicted: int = 0
    failures: OrderedDict[Hashable, str] = field(default_factory=OrderedDict)


class StepGraphs:
    """Evaluates a transformer, by a CUDA graph where that is asked for or pays.

    Args:
        transformer: all of it on one device.
        mode: "on": every step but the first ones of a signature; "auto": where the step is predicted to keep the host busier
            than the GPU; "off": none.
        limit_bytes: device memory of all graphs together. The least recently used go first.
        has_plan: whether a memory plan decides where the weights are.
        capturing: captures.
        capability: the GPU's compute capability; asked from the driver by default.

    Raises:
        BackendError: "on", and there can be none; says why.
    """

    def __init__(
        self,
        transformer: Transformer,
        mode: GraphMode,
        *,
        limit_bytes: int,
        has_plan: bool = False,
        capturing: Capturing | None = None,
        capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    ) -> None:
        self._transformer, self._limit_bytes = transformer, limit_bytes
        self._capturing: Capturing = CudaCapturing() if capturing is None else capturing
        self._capability = capability
        device = transformer.img_in.weight.device
        self.reason = why_no_graphs(
            mode, device, has_plan=has_plan, is_shared=transformer.together is not None, capturing=self._capturing
        )
        """Why no step is captured, in one sentence; None where some may be."""
        self.mode = mode
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._never: set[Hashable] = set()
        self._counts = _Counts()

    @property
    def held_bytes(self) -> int:
        """Device memory of all graphs."""
        return sum(graph.size_bytes for graph in list(self._graphs.values()))

    def statistics(self) -> GraphStatistics:
        """What was captured, repeated and refused so far."""
        counts = self._counts
        return GraphStatistics(
            mode=self.mode,
            reason=self.reason,
            kept=len(self._graphs),
            held_bytes=self.held_bytes,
            captured=counts.captured,
            replayed=counts.replayed,
            eager=counts.eager,
            evicted=counts.evicted,
            failures=(*counts.failures.values(),),
        )

    def evaluate(self, run: Run, latents: Tensor, modulation: Tensor) -> Tensor:
        """The velocity [T_out, in_channels]; arguments as `Transformer.forward` takes them.

        Raises:
            CaptureError: mode "on", and the step cannot be captured.
        """
        run = self._transformer.current(run)
        key = signature(run, latents)
        graph = self._current(key)
        if graph is not None:
            self._counts.replayed += 1
            return self._hooked(run, latents, modulation, partial(graph.evaluate, run))
        if not self._is_due(key, run):
            return self._eagerly(run, latents, modulation)
        try:
            graph = self._captured(run, latents, modulation)
        except torch.OutOfMemoryError as error:
            if self.mode == "on":
                raise
            self._refuse(key, run, f"memory ran out: {str(error).splitlines()[0]}")
        except CaptureError as error:
            if self.mode == "on":
                raise CaptureError(f'{error}; cuda_graphs = "auto" or "off" computes such steps without a graph') from error
            self._refuse(key, run, str(error))
        else:
            velocity = self._kept(key, run, graph)
            return self._hooked(run, latents, modulation, lambda *_: velocity)
        return self._eagerly(run, latents, modulation)

    def release(self) -> None:
        """Let go of all graphs and their memory; steps are captured anew when they come again."""
        self._counts.evicted += len(self._graphs)
        self._graphs.clear()

    def _current(self, key: Hashable) -> StepGraph | None:
        graph = self._graphs.get(key)
        if graph is None:
            return None
        if not graph.is_current:
            # Whoever moves weights may go on doing so.
            del self._graphs[key]
            self._seen.pop(key, None)  # Where it was not forgotten for steps of other kinds.
            return None
        self._graphs.move_to_end(key)
        return graph

    def _is_due(self, key: Hashable, run: Run) -> bool:
        if self.reason is not None or key in self._counts.failures or key in self._never:
            return False
        seen = self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > MOST_REMEMBERED:
            self._seen.popitem(last=False)
        if seen <= SEEN_BEFORE_CAPTURE:
            return False
        if self.mode == "on" or self.is_host_bound(run):
            return True
        # By sizes alone, so once is enough.
        if len(self._never) >= MOST_REMEMBERED:
            self._never.clear()
        self._never.add(key)
        return False

    def is_host_bound(self, run: Run) -> bool:
        """Whether a step is predicted to keep the host busier than the GPU."""
        batch, params = run.batch, self._transformer.params
        flops = sum(step_flops(params, tokens) for tokens in batch.tokens)
        eight_bits = self._transformer.single_blocks[0].linear2.takes is not None  # type: ignore[union-attr]
        capability = self._capability(batch.text_tokens.device)
        return host_ms(params, len(batch.joint)) > gpu_ms(flops, capability, eight_bits=eight_bits)

    def _hooked(self, run: Run, latents: Tensor, modulation: Tensor, repeat: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `repeat` gives, by a call of the transformer, whose hooks count and mark its evaluations."""
        velocity: Tensor = self._transformer(replace(run, repeat=repeat), latents, modulation)
        return velocity

    def _eagerly(self, run: Run, latents: Tensor, modulation: Tensor) -> Tensor:
        self._counts.eager += 1
        velocity: Tensor = self._transformer(run, latents, modulation)
        return velocity

    def _captured(self, run: Run, latents: Tensor, modulation: Tensor) -> StepGraph:
        try:
            return StepGraph(self._transformer, run, latents, modulation, self._capturing)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
        self.release()
        return StepGraph(self._transformer, run, latents, modulation, self._capturing)

    def _kept(self, key: Hashable, run: Run, graph: StepGraph) -> Tensor:
        """Keep a graph within the bounds, and give back the velocity of the step that it was made of."""
        velocity, graph.first_velocity = graph.first_velocity, None
        assert velocity is not None
        size = graph.size_bytes
        if size > self._limit_bytes:
            cause = f"its graph takes {size / MIB:.0f} MiB, cuda_graph_mib is {self._limit_bytes / MIB:g}"
            if self.mode == "on":
                raise CaptureError(f'{cause}; raise it, or set cuda_graphs to "auto"')
            self._refuse(key, run, cause)
            self._counts.eager += 1
            return velocity
        while self._graphs and (len(self._graphs) >= MOST_GRAPHS or self.held_bytes + size > self._limit_bytes):
            self._graphs.popitem(last=False)
            self._counts.evicted += 1
        self._graphs[key] = graph
        self._counts.captured += 1
        logger.info("captured a step as a CUDA graph: %.0f MiB, %d kept", size / MIB, len(self._graphs))
        return velocity

    def _refuse(self, key: Hashable, run: Run, cause: str) -> None:
        """Compute steps like this one without a graph from now on, and say so."""
        lengths = run.batch.joint.lengths
        logger.warning("no CUDA graph for steps of sequences of %s tokens: %s; they are computed without one", lengths, cause)
        self._counts.failures[key] = cause
        while len(self._counts.failures) > MOST_REMEMBERED:
            self._counts.failures.popitem(last=False)


PLANNED = "a memory plan brings layers from the host, to other addresses each time"
SHARED = "other processes compute every step with this one, and say what comes next"


def why_no_graphs(
    mode: GraphMode, device: torch.device, *, has_plan: bool, is_shared: bool = False, capturing: Capturing | None = None
) -> str | None:
    """Why no step of an engine can be captured; None where steps may be.

    Args:
        mode: ``cuda_graphs`` of its configuration.
        device: where it runs.
        has_plan: whether a memory plan decides where its weights are.
        is_shared: whether other processes compute every step with this one.
        capturing: captures; the real one by default.

    Raises:
        BackendError: mode "on", and there can be none; says why.
    """
    if mode == "off":
        return 'cuda_graphs is "off"'
    capturing = CudaCapturing() if capturing is None else capturing
    reason = PLANNED if has_plan else SHARED if is_shared else capturing.missing(device)
    if mode == "on" and reason is not None:
        raise BackendError(f'cuda_graphs = "on" cannot be done here: {reason}; "auto" captures steps where that is possible')
    return reason
