"""What a request's time goes to: work counted while steps are taken, kernels sorted by steps and classes, and the command."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, small_transformer
from torch.profiler import ProfilerActivity, profile, record_function

from uso_engine import USOEngine
from uso_engine.cli.console import interrupts
from uso_engine.model.packing import PackedBatch
from uso_engine.model.roofline import GPUS, Tokens, floor_ms, step_flops
from uso_engine.profiling import ceilings, request_profile
from uso_engine.profiling.ceilings import MeasuredRates, known_rates, measure_rates
from uso_engine.profiling.kernel_classes import KernelTime, class_of, floors_by_class, times_by_class
from uso_engine.profiling.request_profile import STEP, split_by_steps
from uso_engine.profiling.step_work import StepWork, counted_steps
from uso_kernels.cpu import widens

RATES = MeasuredRates(gemm_rate=1e12, attention_rate=5e11, bandwidth_gbs=100, source="by agreement")
CPU = torch.device("cpu")
# uso-tiny is in bfloat16, which not every CPU multiplies.
MEASURED = f"% of the floor (measured in {'float32' if widens(torch.empty(0, dtype=torch.bfloat16)) else 'bfloat16'}, "


@pytest.fixture(scope="module")
def engine() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        yield engine


def test_lengths_are_those_of_every_sequence_of_a_batch() -> None:
    transformer = small_transformer()
    first = drawn_sequence(transformer, (4, 6), drawn_conditions(SMALL, seed=1, text=10, style=6, contents=((8, 8), (4, 8))))
    second = drawn_sequence(transformer, (2, 2), drawn_conditions(SMALL, seed=2, text=5))
    batch = PackedBatch.form([first, second])
    assert batch.tokens == (Tokens(text=16, image=24, content=24), Tokens(text=5, image=4))
    with counted_steps(transformer) as work, torch.no_grad():
        for _ in SIGMAS[:2]:
            transformer(batch, torch.zeros(batch.output.rows, 64), torch.stack([s.modulation[0] for s in (first, second)]))
    assert work.sequences == Counter(dict.fromkeys(batch.tokens, 2))
    assert work.flops == 2 * sum(step_flops(SMALL, tokens) for tokens in batch.tokens)
    assert work.floor_ms(RATES) == 2 * sum(floor_ms(SMALL, tokens, RATES)["floor"] for tokens in batch.tokens)


def test_nothing_is_counted_outside_and_a_negative_prompt_is_counted(engine: USOEngine) -> None:
    fields: dict[str, Any] = {"prompt": "a boat", "image_size": {"width": 64, "height": 64}, "seed": 1}
    with counted_steps(engine.pipeline.transformer) as plain:
        engine.generate(num_inference_steps=3, **fields)
    with counted_steps(engine.pipeline.transformer) as guided:
        engine.generate(num_inference_steps=3, negative_prompt="a house", true_cfg_scale=2.0, **fields)
    assert (plain.sequences.total(), guided.sequences.total()) == (3, 6)
    assert guided.flops == 2 * plain.flops


def test_speed_is_work_over_time_and_the_floor_s_share_of_it() -> None:
    work = StepWork(SMALL, Counter({Tokens(text=32, image=64): 4}))
    seconds = 2e-3 * work.floor_ms(RATES)
    assert work.speed(seconds, RATES) == f"{work.flops / seconds / 1e12:.3g} TFLOP/s, 50% of the floor (by agreement)"
    assert StepWork(SMALL).speed(1.0, RATES) == "no step was taken"


def test_a_gpu_on_record_is_not_measured_and_another_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    assert known_rates(gpu, torch.bfloat16) is GPUS["H200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(ceilings, "measure_rates", lambda device, dtype: RATES)
    assert known_rates(gpu, torch.bfloat16) is RATES


def test_rates_of_a_cpu_are_measured_by_the_clock_that_is_given() -> None:
    readings = iter(range(1000))
    rates = measure_rates(CPU, torch.float32, clock=lambda: float(next(readings)))
    assert rates.gemm_rate == 2 * 1024**3
    assert rates.attention_rate == 4 * 512**2 * 8 * 128
    assert rates.bandwidth_gbs == pytest.approx(8e-9 * 2**23)
    assert rates.source.startswith("measured in float32, ")


def test_the_best_of_two_measurements_is_the_higher_of_each_rate() -> None:
    other = MeasuredRates(gemm_rate=2e12, attention_rate=4e11, bandwidth_gbs=101, source="later")
    best = MeasuredRates(gemm_rate=2e12, attention_rate=5e11, bandwidth_gbs=101, source="by agreement")
    assert RATES.best(other) == best


def test_the_ceiling_of_attention_is_the_fastest_way_to_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only work moves, the engine's way takes half as long as PyTorch's call."""
    now = [0.0]

    def taking(seconds: float) -> Callable[..., None]:
        return lambda *operands: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(ceilings, "attention", taking(2.0))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", taking(4.0))
    monkeypatch.setattr(torch.nn.functional, "linear", taking(1.0))
    monkeypatch.setattr(torch.Tensor, "copy_", taking(1.0))
    assert measure_rates(CPU, torch.float32, clock=lambda: now[0]).attention_rate == 4 * 512**2 * 8 * 128 / 2


def test_operations_are_sorted_into_those_of_steps_and_all_others() -> None:
    a = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        a.exp()
        for _ in range(2):
            with record_function(STEP):
                a @ a
                time.sleep(0.001)
            a.exp()
    inside, outside = split_by_steps(list(profiler.events()), on_gpu=False)
    assert (inside["aten::mm"].launches, outside["aten::exp"].launches) == (2, 3)
    assert "aten::exp" not in inside and "aten::mm" not in outside and STEP not in {*inside, *outside}
    assert inside["aten::mm"].milliseconds > 0


def test_kernels_are_known_by_their_names() -> None:
    names = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_cga1x1x1_kernel0_0": "attention",
        "_qk_norm_rope_kernel": "q/k norm, rotation",
        "_gated_residual_kernel": "gated residual, norm",
        "_gelu_concat_kernel": "gelu",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_gelu_bias_TNT": "products",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda": "copies",
        "Memcpy DtoD (Device -> Device)": "copies",
        "something else": "other",
    }
    assert {name: class_of(name) for name in names} == names


def test_classes_stand_beside_their_floors_the_longest_first() -> None:
    kernels = {"aten::addmm": KernelTime(3.0, 2), "void cutlass_gemm": KernelTime(1.0, 1), "flash_fwd": KernelTime(9.0, 5)}
    table = times_by_class(kernels, {"products": 2.0, "attention": 4.5, "q/k norm, rotation": 0.5})
    assert list(table) == ["attention", "products", "q/k norm, rotation"]
    assert table["products"] == {"ms": 4.0, "launches": 3.0, "floor_ms": 2.0, "share_of_floor": 0.5}
    assert "share_of_floor" not in table["q/k norm, rotation"]
    one, two = (floors_by_class(SMALL, [Tokens(text=32, image=64)] * count, RATES) for count in (1, 2))
    assert two == {name: pytest.approx(2 * floor) for name, floor in one.items()}


def test_a_request_is_profiled(tmp_path: Path) -> None:
    trace, table = tmp_path / "trace.json", tmp_path / "table.txt"
    picture = Path(__file__).parents[1] / "docs" / "quality" / "sheet.png"
    arguments = ["--image", str(picture), "--size", "64x64", "--device", "cpu", "--trace", str(trace), "--table", str(table)]
    code, printed = run("profile", *arguments)
    assert code == 0, printed
    written = table.read_text()
    assert " ".join(written.split()) in printed
    rows = {line[:24].strip(): line[24:].split() for line in written.splitlines()[1:]}
    # Both steps' 11 products: two streams of a double block, single blocks by parts, the ends.
    assert float(rows["products"][0]) > 0 and int(rows["products"][1]) >= 20
    assert float(rows["products"][2]) > 0 and rows["products"][3].endswith("%")
    assert "2 steps: " in written and " TFLOP/s, " in written and MEASURED in written
    assert "encode" in written
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == STEP and event.get("ph") == "X"]
    convolutions = [event for event in events if event.get("name") == "aten::convolution"]
    assert len(steps) == 2
    # The content image is encoded again, though the first request left it in the cache; decoding comes after the steps.
    begins, ends = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    assert any(event["ts"] < begins for event in convolutions) and any(event["ts"] > ends for event in convolutions)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "num_inference_steps must be a whole number from 1 to 50, got 0"),
        (["--steps", "many"], 2, "Invalid value for '--steps'"),
        (["--size", "1x1"], 2, "width"),
        (["--trace", "same.json", "--table", "same.json"], 2, "--table and --trace name the same file, same.json"),
        (["--trace", "no/such/folder.json"], 1, "cannot write no/such/folder.json: there is no folder"),
        (["--config", "no-such"], 1, "no-such"),
        (["--attention", "psychic"], 1, "psychic"),
    ],
)
def test_what_cannot_be_profiled_is_said_before_anything_runs(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, printed = run("profile", *arguments)
    assert ended == code, printed
    assert message in printed
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = request_profile.profile_request

    def interrupted(*arguments: Any) -> object:
        interrupts.seen = True
        return real(*arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupts, "seen", False)
    monkeypatch.setattr(request_profile, "profile_request", interrupted)
    code, printed = run("profile", "--image", "none", "--size", "64x64", "--device", "cpu")
    assert (code, list(tmp_path.iterdir())) == (130, [])
    assert "nothing half-written is left behind" in printed


@pytest.fixture
def quiet_afterwards() -> Iterator[None]:
    logger = logging.getLogger("uso_engine")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("quiet_afterwards")
def test_verbose_says_how_fast_the_steps_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "--prompt", "x", "--size", "64x64", "--steps", "1", "--device", "cpu"]
    assert "of the floor" not in run(*arguments)[1]
    code, printed = run(*arguments, "-v")
    assert code == 0
    assert "TFLOP/s, " in printed and MEASURED in printed
