"""What the caller's process has set reaches neither results nor caches, and is there again afterwards."""

from __future__ import annotations

import itertools
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image

from uso_engine import USOEngine, process_state
from uso_engine.api.research import ResearchOptions
from uso_engine.process_state import clean_process_state

TraceFunction = Callable[[FrameType, str, object], Any]
PICTURE = Image.radial_gradient("L").convert("RGB").resize((64, 64))
FIELDS: dict[str, Any] = {
    "prompt": "a house",
    "images": [PICTURE, PICTURE],
    "image_size": {"width": 64, "height": 64},
    "seed": 3,
}


@contextmanager
def changed(set_: Callable[[object], object], value: object, before: object) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


def deterministic(value: object) -> None:
    torch.use_deterministic_algorithms(bool(value))


def math_attention_only(value: object) -> None:
    torch.backends.cuda.enable_flash_sdp(not value)
    torch.backends.cuda.enable_mem_efficient_sdp(not value)


def medium_precision(value: object) -> None:
    torch.set_float32_matmul_precision("medium" if value else "highest")


def tf32(value: object) -> None:
    torch.backends.fp32_precision = "tf32" if value else "none"  # type: ignore[attr-defined]


def oldest_tf32(value: object) -> None:
    torch.backends.cudnn.allow_tf32 = bool(value)
    torch.backends.cuda.matmul.allow_tf32 = bool(value)


def without_onednn(value: object) -> None:
    torch.backends.mkldnn.enabled = not value  # type: ignore[assignment]


AMBIENT: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 by default": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),  # type: ignore[arg-type]
    "float64 by default": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),  # type: ignore[arg-type]
    "meta device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic algorithms": lambda: changed(deterministic, True, False),
    "attention by plain products": lambda: changed(math_attention_only, True, False),
    "medium precision": lambda: changed(medium_precision, True, False),
    "TF32": lambda: changed(tf32, True, False),
    "TF32, legacy switches": lambda: changed(oldest_tf32, True, False),
    "without oneDNN": lambda: changed(without_onednn, True, False),
}


def snapshot() -> list[object]:
    """Everything that a caller can read of it; what contradicts itself cannot be read."""
    getter = torch._C._get_fp32_precision_getter
    operations = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "all")]
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cudnn.benchmark,
        torch.backends.mkldnn.enabled,
        *(getter(*operation) for operation in [*operations, ("mkldnn", "matmul"), ("mkldnn", "conv")]),
        readable(torch.get_float32_matmul_precision),
        readable(lambda: torch.backends.cudnn.allow_tf32),
    ]


def readable(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:
        return "contradicts itself"


def made(engine: USOEngine) -> tuple[bytes, torch.Tensor]:
    result = engine.generate(num_inference_steps=1, **FIELDS)
    assert result.latents is not None
    return result.images[0].tobytes(), result.latents


@pytest.fixture(scope="module")
def fresh() -> tuple[bytes, torch.Tensor]:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine:
        return made(engine)


@pytest.mark.parametrize("name", AMBIENT)
def test_pictures_and_caches_are_a_fresh_engines(name: str, fresh: tuple[bytes, torch.Tensor]) -> None:
    """Loaded and asked inside, then asked outside, where the conditions come from the caches."""
    with AMBIENT[name]():
        before = snapshot()
        engine = USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32)
        inside = made(engine)
        assert snapshot() == before
    outside = made(engine)
    engine.close()
    for picture, latents in (inside, outside):
        assert torch.equal(latents, fresh[1])
        assert picture == fresh[0]
        assert not latents.is_inference()


def test_the_state_means_something() -> None:
    """Each of these changes what plain PyTorch computes, here or on a GPU; those that do so here are seen to."""
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = x @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with clean_process_state():
            assert torch.equal(x @ x, expected)
    with AMBIENT["TF32"](), clean_process_state():
        assert torch._C._get_fp32_precision_getter("cuda", "conv") in ("ieee", "none")
        assert torch._C._get_fp32_precision_getter("generic", "all") == "none"
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_latents_made_in_inference_mode_may_be_handed_in(fresh: tuple[bytes, torch.Tensor]) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine, torch.inference_mode():
        latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        result = engine.generate(num_inference_steps=2, research=ResearchOptions(latents=latents), **FIELDS)
        again = engine.generate(num_inference_steps=2, research=ResearchOptions(latents=latents), **FIELDS)
    assert result.latents is not None
    assert again.latents is not None
    assert torch.equal(result.latents, again.latents)


def test_threads_that_overlap_give_the_state_back_once() -> None:
    """The last to leave gives back what the first one found, not what another thread's work had set."""
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with clean_process_state():
            inside.set()
            assert leave.wait(10)

    with changed(torch.set_default_dtype, torch.float16, torch.float32):  # type: ignore[arg-type]
        first = threading.Thread(target=work)
        first.start()
        assert inside.wait(10)
        with clean_process_state():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # The other thread is at work still.
        leave.set()
        first.join()
        assert torch.get_default_dtype() == torch.float16


def test_state_comes_back_after_an_error() -> None:
    with AMBIENT["TF32, legacy switches"]():
        before = snapshot()
        with pytest.raises(KeyboardInterrupt), clean_process_state():
            raise KeyboardInterrupt
        assert snapshot() == before


def test_callbacks_keep_the_callers_gradients() -> None:
    seen: list[bool] = []
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        engine.generate(num_inference_steps=1, on_step=lambda step: seen.append(torch.is_grad_enabled()), **FIELDS)
    assert seen == [True]


def test_an_interrupt_at_any_line_leaves_the_callers_state() -> None:
    """Ctrl-C anywhere in entering and leaving."""
    torch.set_default_dtype(torch.float16)
    before = snapshot()
    try:
        for line in itertools.count(1):
            if not interrupted(line):
                break
            assert snapshot() == before, f"after an interrupt at line {line}"
        assert line > 100
    finally:
        torch.set_default_dtype(torch.float32)


def interrupted(line: int) -> bool:
    """Enter and leave with an interrupt before one of the lines that are run; whether it came to that."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal count
        if frame.f_code.co_filename != process_state.__file__:
            return None
        # A line that says no more than "try" has no instruction at which Python would look for signals.
        if event == "line" and linecache.getline(process_state.__file__, frame.f_lineno).strip() != "try:":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        with clean_process_state():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False
