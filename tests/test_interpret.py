"""A process may run every kernel interpreted on CPU tensors: the model then gives the reference's answer by way of Triton."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_runs import require_interpreter, run_kernel

from uso_kernels.interpret import interpreter_missing, register_cpu_launches
from uso_kernels.launch import TritonUnavailable, generation_of
from uso_kernels.quantize_rows import quantize_rows_into
from uso_kernels.rows import new_quantized, quantize_rows_reference

PROGRAM = """
from dataclasses import replace
import torch
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from uso_engine.precision.int4_linear import Int4Linear
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.latents import draw_noise
from uso_kernels.launch import Launch
from uso_kernels.interpret import register_cpu_launches

# Every kernel runs in one double and two single blocks, the last of which is another than those before it.
params = replace(SMALL, depth=1)
torch.set_num_threads(1)

half = torch.bfloat16

def run(dtype, kind=None):
    transformer = small_transformer(params, dtype=dtype)
    if kind is not None:
        quantise(transformer, kind)
    transformer.attention_backend = "triton"
    sequence = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=1, text=10, style=4, contents=((4, 2),)))
    # Once is enough for a second sequence and the guided update: neither depends on how weights are kept.
    negative = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=2, text=17)) if dtype is half else None
    denoiser = DenoisingRun(transformer, [ImageJob(sequence, draw_noise(80, 48, 1), SIGMAS, negative, 2.0)])
    denoiser.step()
    return denoiser.latents()[0]

cases = ((torch.float32,), (torch.bfloat16,), (torch.float32, Int8Linear), (torch.float32, Int4Linear))
before = [run(*case) for case in cases]
launched = []
kernel_run = Launch.run
Launch.run = lambda self: (launched.append(self.name), kernel_run(self))[1]
register_cpu_launches()
after = [run(*case) for case in cases]
print(*(float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)))
print(*sorted(set(launched)))
"""


def version_of(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(package).split("+")[0].split(".")[:2]))


def test_the_interpreter_runs_with_every_pair_of_versions_but_one() -> None:
    """What cannot be interpreted is skipped elsewhere, so this says where that may be: Triton 3.6 with numpy from 2.4 on."""
    reason = interpreter_missing()
    if torch.cuda.is_available():
        assert reason is not None and "TRITON_INTERPRET" in reason
    elif version_of("triton") < (3, 7) and version_of("numpy") >= (2, 4):
        assert reason is not None and "numpy<2.4" in reason
        with pytest.raises(TritonUnavailable, match=r"numpy<2\.4"):
            register_cpu_launches()
    else:
        assert reason is None


def test_the_model_through_interpreted_kernels(repository: Path) -> None:
    require_interpreter()
    paths = f"{repository}:{repository / 'kernels'}:{repository / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    answer = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    errors, names = answer.stdout.splitlines()
    float32_error, bfloat16_error, int8_error, int4_error = map(float, errors.split())
    assert 0 < float32_error < 1e-6
    assert 0 < bfloat16_error < 1e-2
    # Values on the border between two integers may fall on either side.
    assert 0 < int8_error < 5e-3
    assert 0 < int4_error < 1e-6
    assert names.split() == [
        "attention", "euler_update", "gated_residual", "gelu_concat", "int4_dequantize", "int8_matmul", "layer_norm_modulate",
        "qk_norm_rope", "quantize_rows", "split_streams",
    ]  # fmt: skip


def test_without_triton_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uso_kernels.interpret.TRITON_MISSING", "triton is not installed")
    assert interpreter_missing.__wrapped__() == "triton is not installed"


def test_without_the_interpreter_it_is_refused(repository: Path) -> None:
    program = "from uso_kernels.interpret import register_cpu_launches as register; register()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(repository / "kernels")
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "TritonUnavailable: set TRITON_INTERPRET=1" in answer.stderr


def test_types_that_the_interpreter_cannot_round_are_rounded_by_torch() -> None:
    """124.3 in float8 is 128; the interpreter alone says 64."""
    x = torch.tensor([[448.0, 124.3, 7.95]])
    values, scales = new_quantized(1, 3, torch.float8_e4m3fn, x.device)
    run_kernel(quantize_rows_into, x, values, scales)
    assert values.float().tolist() == [[448.0, 128.0, 8.0]]
    assert torch.equal(values.float(), quantize_rows_reference(x, torch.float8_e4m3fn)[0].float())


def test_kernels_refuse_what_they_have_no_type_for() -> None:
    with pytest.raises(ValueError, match="float64"):
        generation_of(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(TritonUnavailable, match="meta"):
        generation_of(torch.zeros(1, device="meta"))
