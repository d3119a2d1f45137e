"""GPUs that cannot be used, that others hold, or whose memory runs out: each an error that says what, and what would do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch

from uso_engine.cli.serve import _gpu_memory
from uso_engine.config import load_config
from uso_engine.engine import USOEngine
from uso_engine.errors import BackendError, DeviceMemoryError, MemoryBudgetError
from uso_engine.loading.device import check_device, cuda_missing, default_device, memory_note
from uso_engine.loading.transformer import check_attention
from uso_engine.offload.budget import find_budget
from uso_engine.scheduling.assembly import make_loop
from uso_engine.scheduling.stepping import out_of_memory
from uso_engine.scheduling.threads import use_device
from uso_kernels import launch
from uso_kernels.attention import BackendUnavailable, available_backends, resolve_backends
from uso_kernels.ragged import Ragged

GIB = 2**30
CUDA = torch.device("cuda")
CONFIG = load_config("uso-tiny")
DRIVER_FAILURE = launch._driver_failure.__wrapped__
# What torch says; the second where a container has no driver at all.
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
NO_DRIVER = "Found no NVIDIA driver on your system."


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes torch answer as with one GPU."""

    def answer(
        capability: tuple[int, int] = (9, 0), free_gib: float = 70.0, total_gib: float = 80.0, own_gib: float = 0.0
    ) -> None:
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda device=None: capability,
            "get_device_name": lambda device=None: "a GPU",
            "mem_get_info": lambda device=None: (int(free_gib * GIB), int(total_gib * GIB)),
            "memory_reserved": lambda device=None: int(own_gib * GIB),
            "empty_cache": lambda: None,
        }
        for name, function in answers.items():
            monkeypatch.setattr(torch.cuda, name, function)

    launch._generation.cache_clear()
    monkeypatch.setattr(launch, "TRITON_MISSING", None)
    monkeypatch.setattr(launch, "_driver_failure", lambda: None)
    yield answer
    launch._generation.cache_clear()


@pytest.mark.parametrize("message", [OLD_DRIVER, NO_DRIVER])
def test_a_driver_that_does_not_do(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, message: str) -> None:
    """Asked for, a GPU is an error with the driver's reason; by default the CPU computes, and a warning says so."""

    def fail() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(BackendError, match=f"'cuda' was asked for, but torch .* sees no CUDA GPU: {message[:30]}.*'cpu' works"):
        USOEngine.from_config("uso-tiny", device="cuda")
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        assert default_device() == torch.device("cpu")
    assert message[:30] in caplog.text and "slower" in caplog.text


def test_a_torch_without_cuda_is_no_surprise(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert str(cuda_missing()).endswith("sees no CUDA GPU: it is built without CUDA")
    assert default_device() == torch.device("cpu")
    assert caplog.records == []


def test_a_gpu_that_another_process_holds_for_itself(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()

    def busy(device: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(BackendError, match=r"does not answer: CUDA error: all CUDA-capable devices are busy .*nvidia-smi"):
        USOEngine.from_config("uso-tiny", device="cuda")


def test_a_gpu_that_has_no_kernels(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old, newer than known, or without Triton: refused before anything is loaded, in every tier."""
    for capability, reason in (((7, 5), "8.0 or later, this one has 7.5"), ((13, 0), "this one has 13.0")):
        gpu(capability)
        launch._generation.cache_clear()
        with pytest.raises(BackendError, match=f"kernels do not run on it: .*{reason}; device 'cpu' works"):
            USOEngine.from_config("uso-tiny", device="cuda", dtype=torch.float32)
    gpu()
    launch._generation.cache_clear()
    assert check_device("cuda") == check_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(BackendError, match="there are only 1 GPUs"):
        check_device("cuda:1")
    monkeypatch.setattr(launch, "TRITON_MISSING", "triton cannot be loaded: libcuda.so.1: cannot open shared object file")
    with pytest.raises(BackendError, match=r"libcuda\.so\.1: .*'gpu' extra.*device 'cpu' works"):
        check_device("cuda")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "Failed to find C compiler"),
        (CalledProcessError(1, ["gcc", "main.c"]), r"'main\.c'\]' returned non-zero exit status 1"),
        (PermissionError(13, "Permission denied", "/srv/.triton"), "Permission denied: '/srv/.triton'"),
        (AssertionError("libcuda.so cannot found!"), "libcuda.so cannot found"),
    ],
    ids=["no compiler", "no headers", "no cache", "no driver"],
)
def test_a_gpu_for_which_triton_cannot_compile_what_launches(
    error: Exception, reason: str, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before 24 GB are loaded, and not by the first step after that."""

    class Driver:
        @property
        def utils(self) -> object:
            raise error

    gpu()
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.runtime.driver._active", Driver())
    monkeypatch.setattr(launch, "_driver_failure", DRIVER_FAILURE)
    with pytest.raises(BackendError, match=rf"cannot launch kernels: .*{reason}.*needs a C compiler.*python3-dev.*'cpu' works"):
        USOEngine.from_config("uso-tiny", device="cuda")


def test_threads_are_given_the_gpu_that_was_current_where_the_engine_was_made(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses to set a GPU without a number, and in a new thread "cuda" alone would be the first one."""
    gpu()
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, stream, str)  # The same one of each device.
    use_device(check_device(default_device()))
    assert chosen == [1]
    with pytest.raises(ValueError, match="specified index"):
        use_device(CUDA)
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        loop = make_loop(replace(engine.parts, device=CUDA), threaded=False)
    use_device(loop.device)
    assert chosen == [1, 1]


def test_a_gpu_that_lacks_fp8(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with the tiers that work there, before a weight is read."""
    gpu((8, 6))
    precision = CONFIG.precision.model_copy(update={"tier": "fp8"})

    def read(*given: object, **named: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("uso_engine.loading.transformer.resolve", read)
    monkeypatch.setattr("uso_engine.loading.assembly.load_safety_checker", lambda *given, **named: None)
    with pytest.raises(
        BackendError, match=r"'fp8' needs compute capability 8\.9 .*a GPU has 8\.6; .*float32, bf16, int8, int4"
    ):
        USOEngine.from_config(CONFIG.model_copy(update={"precision": precision}), device="cuda")


def test_an_attention_extension_that_cannot_load(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for it is an error with its reason and the backends that run; nobody asks, nobody is told another ran."""
    gpu()
    reason = "xformers cannot load its kernels: libcudart.so.12: cannot open shared object file"
    monkeypatch.setattr("uso_kernels.attention.xformers._failure", lambda: reason)
    assert available_backends("cuda")["xformers"] == reason
    layout = Ragged.pack([32])

    class OnGPU:
        device, dtype = CUDA, torch.bfloat16

    with pytest.raises(BackendUnavailable, match=r"libcudart\.so\.12.*these can: \['dense', 'dense_batched'"):
        resolve_backends("xformers", OnGPU(), layout, layout)  # type: ignore[arg-type]


def test_memory_that_runs_out_while_loading(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(free_gib=3.0, own_gib=12.0)

    def short(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.00 MiB.\nmore lines")

    monkeypatch.setattr("uso_engine.loading.assembly.load_safety_checker", short)
    with pytest.raises(DeviceMemoryError) as caught:
        USOEngine.from_config("uso-tiny", device="cuda")
    message = str(caught.value)
    for part in (
        "loading uso-tiny: CUDA out of memory. Tried",
        "3.00 of 80.00 GiB are free",
        "65.00 are held",
        "memory_budget_gib",
    ):
        assert part in message
    assert "more lines" not in message
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_memory_that_runs_out_in_a_step_names_who_holds_it(gpu: Callable[..., None]) -> None:
    gpu(free_gib=1.0, total_gib=24.0, own_gib=12.0)
    message = str(out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), "a denoising step"))
    assert "in a denoising step: CUDA out of memory.; 1.00 of 24.00 GiB are free, 11.00 are held outside" in message
    assert "fewer images" in message and "memory_budget_gib" in message
    gpu(free_gib=11.5, total_gib=24.0, own_gib=12.0)
    assert memory_note(CUDA) == "11.50 of 24.00 GiB are free"
    assert memory_note(torch.device("cpu")) == ""


def test_a_second_process_on_the_gpu(gpu: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """By default layers then come from the host, and a warning says why; a budget that is not there is an error."""
    flux = load_config("uso-flux-dev")
    gpu(free_gib=79.0)
    with caplog.at_level(logging.WARNING):
        assert find_budget(flux, "bf16", CUDA, None) is None
        assert caplog.records == []
        gpu(free_gib=14.0)
        budget = find_budget(flux, "bf16", CUDA, None)
    assert budget is not None and budget.size_bytes == 14 * GIB
    assert "14.00 GiB that cuda has free of 80.00 (66.00 are held by other processes)" in caplog.text
    assert "slower" in caplog.text
    with pytest.raises(MemoryBudgetError, match=r"is 40, but cuda has 14\.00 GiB free, 66\.00 are held by other processes"):
        find_budget(flux, "bf16", CUDA, 40.0)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 0), "8-bit floats need a GPU of compute capability 8.9 (Ada) or later, this one has 8.0"),
        ((8, 6), "8-bit floats need a GPU of compute capability 8.9 (Ada) or later, this one has 8.6"),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), "Triton has no fast products of 8-bit integers for compute capability 10.0"),
        ((12, 0), None),
    ],
)
def test_eight_bit_attention_says_which_gpu_it_needs(
    capability: tuple[int, int], reason: str | None, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(capability)
    assert available_backends("cuda")["8bit"] == reason
    if reason is not None:
        with pytest.raises(BackendError, match=rf"'8bit' cannot run on cuda: .*{capability[0]}\.{capability[1]}"):
            check_attention("8bit", "cuda")
    monkeypatch.setattr(launch, "TRITON_MISSING", "triton is not installed")
    assert "triton is not installed" in str(available_backends("cuda")["8bit"])


def test_a_server_reports_the_memory_of_the_engines_gpu(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks nothing of another one, which would take memory there."""
    gpu()
    for name, number in {"memory_allocated": 1, "memory_reserved": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: 10 * device.index + number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * device.index + 3, 10 * device.index + 4))
    assert _gpu_memory("cuda:2") == {"allocated": 21, "reserved": 22, "free": 23, "total": 24}
    assert _gpu_memory("cpu") == {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert _gpu_memory(None) == {}
