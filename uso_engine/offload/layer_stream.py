"""Layers that live in pinned host memory and come to the GPU for their forward pass, the next one on its way meanwhile.

On the device there are two buffers, one for the layer that runs and one for the next, so memory is fixed however far the host
runs ahead: a copy into a buffer waits until the layer that used it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from uso_engine.model.transformer import Transformer
from uso_engine.precision.transformer import is_modulation

from .host_copy import HostCopy
from .phases import BUFFERS, MODULATION
from .plan import MemoryPlan


class _Buffer:
    """Device memory for one layer at a time."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.ready = torch.cuda.Event() if device.type == "cuda" else None
        self.free = torch.cuda.Event() if device.type == "cuda" else None


class LayerStream:
    """Brings layers to a device, in the order in which they run.

    Args:
        layers: called through ``module(...)``, in this order, once or (blocks of a transformer) over and over.
        device: where they run.
        excluded: parts of the layers that do not run with them and are left alone.
        repeats: whether the first layer follows the last; otherwise device memory is let go after the last.

    Raises:
        ValueError: no layers.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        device: torch.device | str,
        *,
        excluded: Sequence[nn.Module] = (),
        repeats: bool = False,
    ) -> None:
        if not layers:
            raise ValueError("nothing to stream: expected at least one layer")
        self.device = torch.device(device)
        self._is_gpu = self.device.type == "cuda"
        self._repeats = repeats
        self._layers = [HostCopy([layer], excluded, pinned=self._is_gpu) for layer in layers]
        self._buffers: list[_Buffer] = []
        self._copies = torch.cuda.Stream(self.device) if self._is_gpu else None
        self.moved_bytes = 0
        self._hooks = []
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(self._before(index)))
            self._hooks.append(layer.register_forward_hook(self._after(index), always_call=True))

    @property
    def host_bytes(self) -> int:
        """Pinned memory of all layers."""
        return sum(layer.size_bytes for layer in self._layers)

    @property
    def device_bytes(self) -> int:
        """Memory taken on the device now."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def release(self) -> None:
        """Let go of device memory until the next layer runs."""
        if self._copies is not None:
            self._copies.synchronize()
            torch.cuda.current_stream(self.device).synchronize()
        # An interrupted layer never reached its hook; its tensors must not keep a buffer alive.
        for layer in self._layers:
            layer.rest()
        self._buffers = []

    def take_over(self) -> None:
        """Let what others have put into the layers since be what is streamed from now on."""
        # Before the buffers go: letting go of them puts the host's tensors back into the layers.
        for layer in self._layers:
            layer.take_over()
        self.release()

    def remove(self) -> None:
        """Stop streaming; the layers stay on the host."""
        for hook in self._hooks:
            hook.remove()
        self.release()

    def _before(self, index: int) -> Callable[[nn.Module, object], None]:
        def bring(module: nn.Module, arguments: object) -> None:
            if not self._buffers:
                size = max(layer.size_bytes for layer in self._layers)
                count = min(BUFFERS, len(self._layers))
                self._buffers = [_Buffer(size, self.device) for _ in range(count)]
                if self._copies is not None:
                    # The allocator may hand out memory that work already queued on this stream still reads.
                    self._copies.wait_stream(torch.cuda.current_stream(self.device))
            buffer = self._buffer_with(index)
            if buffer.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.ready)
            self._layers[index].run_from(buffer.memory)
            following = index + 1
            if following == len(self._layers):
                following = 0 if self._repeats else index
            if all(other.holds != following for other in self._buffers):
                self._fetch(following, next(other for other in self._buffers if other is not buffer))

        return bring

    def _after(self, index: int) -> Callable[[nn.Module, object, object], None]:
        def put_back(module: nn.Module, arguments: object, output: object) -> None:
            layer = self._layers[index]
            layer.rest()
            for buffer in self._buffers:
                if buffer.holds == index and buffer.free is not None:
                    buffer.free.record(torch.cuda.current_stream(self.device))
            if index + 1 == len(self._layers) and not self._repeats:
                self.release()

        return put_back

    def _buffer_with(self, index: int) -> _Buffer:
        for buffer in self._buffers:
            if buffer.holds == index:
                return buffer
        return self._fetch(index, self._buffers[0])

    def _fetch(self, index: int, buffer: _Buffer) -> _Buffer:
        source = self._layers[index].memory
        # Interrupted between here and the end, a buffer holds no layer.
        buffer.holds = None
        if self._copies is None:
            buffer.memory[: source.nbytes].copy_(source)
        else:
            assert buffer.free is not None
            assert buffer.ready is not None
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(buffer.free)
                buffer.memory[: source.nbytes].copy_(source, non_blocking=True)
                buffer.ready.record(self._copies)
        buffer.holds = index
        self.moved_bytes += source.nbytes
        return buffer


def place_transformer(transformer: Transformer, plan: MemoryPlan, device: torch.device | str) -> dict[str, LayerStream]:
    """Bring a transformer that is on the host to where a plan wants it.

    Args:
        transformer: with values in place, on the CPU.
        plan: what is resident and what is streamed.
        device: the GPU.

    Returns:
        Streams by what they hold: "modulation linears", "blocks". Call `release` of the latter when denoising ends.
    """
    modulation = [layer for name, layer in transformer.named_modules() if is_modulation(name)]
    blocks = [transformer.double_blocks[i] for i in plan.streamed_double_blocks]
    blocks += [transformer.single_blocks[i] for i in plan.streamed_single_blocks]
    streams: dict[str, LayerStream] = {}
    if blocks:
        streams["blocks"] = LayerStream(blocks, device, excluded=modulation, repeats=True)
    if MODULATION in plan.streamed:
        streams[MODULATION] = LayerStream(modulation, device)
    else:
        for layer in modulation:
            layer.to(device)
    _make_resident(transformer, [*blocks, *modulation], device)
    return streams


def _make_resident(module: nn.Module, streamed: Sequence[nn.Module], device: torch.device | str) -> None:
    left_out = {id(part) for layer in streamed for part in layer.modules()}
    # A tensor that has two names (T5's embedding) stays one. The old one is kept too: a freed tensor's id is used again.
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        if id(part) in left_out:
            continue
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(tensor) not in moved:
                there = tensor.to(device)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = tensor, nn.Parameter(there, requires_grad=False) if is_parameter else there
            setattr(part, name, moved[id(tensor)][1])
