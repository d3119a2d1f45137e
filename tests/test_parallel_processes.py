"""An engine that computes with several processes: the same pictures but for rounding, LoRAs in all of them, and no hang."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uso_engine import GenerationResult, USOEngine
from uso_engine.config import EngineConfig, load_config, parse_config
from uso_engine.errors import BackendError, ConfigError, EngineDeadError, MemoryBudgetError, ParallelError
from uso_engine.loading import follower_processes
from uso_engine.loading.follower_processes import FollowerProcesses, follower_devices

BASE = load_config("uso-tiny")
CPU = torch.device("cpu")
LAYER = "double_blocks.0.img_attn.proj"
REQUEST: dict[str, Any] = {"prompt": "a fish", "seed": 7, "image_size": {"width": 96, "height": 64}, "num_inference_steps": 2}


def with_processes(count: int, base: EngineConfig = BASE, **changes: object) -> EngineConfig:
    return parse_config({**dict(base), "parallel": {"ulysses": count, "step_timeout_s": 60.0}, **changes})


def followers() -> list[int]:
    """Processes that this one has started and that compute with it."""
    # Without -ww, lines end where COLUMNS says, and with the path of the interpreter what is looked for may lie beyond.
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "follower_processes" in line]


@pytest.fixture(scope="module")
def three() -> Iterator[USOEngine]:
    """uso-tiny, whose transformer has three heads, in three processes, in float32."""
    with USOEngine.from_config(with_processes(3), device="cpu", dtype=torch.float32) as engine:
        yield engine


@pytest.fixture(scope="module")
def one() -> Iterator[USOEngine]:
    with USOEngine.from_config(BASE, device="cpu", dtype=torch.float32) as engine:
        yield engine


def largest_difference(a: GenerationResult, b: GenerationResult) -> int:
    return max(
        int(np.abs(np.asarray(x).astype(int) - np.asarray(y).astype(int)).max())
        for x, y in zip(a.images, b.images, strict=True)
    )


def test_pictures_and_loras_are_those_of_one_process(three: USOEngine, one: USOEngine, tmp_path: Path) -> None:
    """A rounding may move a value from one side of a half to the other: one level at the most."""
    assert len(followers()) == 2
    expected = one.generate(**REQUEST, num_images=2)
    assert largest_difference(three.generate(**REQUEST, num_images=2), expected) <= 1
    pair = {f"{LAYER}.lora_A.weight": torch.full((2, 192), 3.0), f"{LAYER}.lora_B.weight": torch.full((192, 2), 0.02)}
    save_file(pair, tmp_path / "much.safetensors")
    for engine in (three, one):
        engine.set_loras([(tmp_path / "much.safetensors", 1.0)])
    changed = one.generate(**REQUEST)
    assert largest_difference(changed, one.generate(**REQUEST)) == 0
    assert np.abs(np.asarray(changed.images[0]).astype(int) - np.asarray(expected.images[0]).astype(int)).max() > 20
    assert largest_difference(three.generate(**REQUEST), changed) <= 1
    for engine in (three, one):
        engine.set_loras([])
    assert largest_difference(three.generate(**REQUEST, num_images=2), expected) <= 1


def test_a_process_that_is_killed_ends_the_engine_and_nothing_hangs() -> None:
    engine = USOEngine.from_config(with_processes(3), device="cpu", dtype=torch.float32)
    mine = followers()[-2:]

    def kill(step: object) -> None:
        os.kill(mine[0], signal.SIGKILL)

    with pytest.raises((EngineDeadError, ParallelError), match=r"lost the others|have ended"):
        engine.generate(**{**REQUEST, "num_inference_steps": 50}, on_step=kill)
    with pytest.raises(EngineDeadError):
        engine.generate(**REQUEST)
    engine.close()
    assert not set(mine) & set(followers())


def test_a_process_that_hangs_between_steps_ends_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no message, and a step's limit is all that anybody waits for it."""
    monkeypatch.setattr(follower_processes, "_ENDING_S", 0.0)
    config = parse_config({**dict(BASE), "parallel": {"ulysses": 3, "step_timeout_s": 3.0}})
    others = followers()
    with USOEngine.from_config(config, device="cpu") as engine:
        pid = next(pid for pid in followers() if pid not in others)
        resort = threading.Timer(40.0, os.kill, (pid, signal.SIGKILL))
        resort.start()
        with pytest.raises(EngineDeadError):
            engine.generate(**REQUEST, on_step=lambda step: os.kill(pid, signal.SIGSTOP))
        assert resort.is_alive()
        resort.cancel()


def test_an_engine_whose_processes_ended_while_it_was_idle_is_closed_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    before = set(followers())
    engine = USOEngine.from_config(with_processes(3), device="cpu", dtype=torch.float32)
    for pid in set(followers()) - before:
        os.kill(pid, signal.SIGKILL)
    engine.close()
    assert set(followers()) == before
    assert "had ended before the engine was closed" in caplog.text and "ended with -9" in caplog.text


def test_processes_end_with_the_interpreter_that_never_closed_its_engine() -> None:
    script = (
        "from test_parallel_processes import *\n"
        "engine = USOEngine.from_config(with_processes(3), device='cpu', dtype=torch.float32)\n"
        "print(*followers(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        gone = subprocess.run(["timeout", "60", "tail", f"--pid={pid}", "-f", "/dev/null"], check=False)
        assert gone.returncode == 0, f"process {pid} is still there"


def test_a_process_that_cannot_load_is_named_with_its_reason(tmp_path: Path) -> None:
    broken = with_processes(3, transformer={**dict(BASE.transformer), "checkpoint": str(tmp_path / "nowhere.safetensors")})
    started = FollowerProcesses(broken, device=CPU, tier="float32", attention="auto")
    with pytest.raises(ParallelError, match=r"ended before it could join: process \d ended with 1: .*nowhere\.safetensors"):
        started.join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel": {"ulysses": 2}},
            "^configuration: parallel.ulysses is 2, which does not divide the transformer's 3 heads",
        ),
        ({"parallel": {"ulysses": 0}}, "parallel.ulysses: .*greater than or equal to 1"),
        ({"parallel": {"ring": 2}}, "unknown key 'parallel.ring'"),
        ({"parallel": {"ulysses": 3}, "memory_budget_gib": 1.0}, "parallel.ulysses and memory_budget_gib exclude each other"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**dict(BASE), **changes})


def test_a_budget_that_a_caller_gives_is_refused_before_anything_is_started() -> None:
    with pytest.raises(MemoryBudgetError, match="exclude each other"):
        USOEngine.from_config(with_processes(3), device="cpu", memory_budget_gib=1.0)


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert follower_devices(torch.device("cuda:1"), 3) == ["cuda:2", "cuda:3"]
    assert follower_devices(CPU, 3) == ["cpu", "cpu"]
    with pytest.raises(BackendError, match=r"ulysses = 3 needs GPUs 2 to 4; this machine has 4"):
        follower_devices(torch.device("cuda:2"), 3)
