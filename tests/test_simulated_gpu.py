"""Whole requests of uso-tiny on a simulated GPU: the CPU's pictures, nothing on another device, no step that waits.

The engine runs on the second of two GPUs, so that what means the current one, or the first, is a fault. In float32 pictures are
the CPU's bit for bit: the same references compute. In 16 bits a CPU joins and widens products as a GPU does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from simulated_cuda import simulated_gpus
from simulated_device import DeviceFault, SimulatedGPUs, Wait
from streamed_engines import config_of, everything_streamed

from uso_engine import ResearchOptions, USOEngine
from uso_engine.config import EngineConfig
from uso_engine.model.run import Run
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.step import Step
from uso_engine.sampling.step_graph import CaptureError
from uso_engine.verification.run import VerifyOptions, verify
from uso_kernels.ragged import Ragged

SECOND = "cuda:1"
Pixels = list[np.ndarray[Any, Any]]
Case = Callable[[USOEngine], Pixels]


def pixels_of(engine: USOEngine, **fields: Any) -> Pixels:
    """The pictures of a request with a content and a style image."""
    content = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    style = Image.radial_gradient("L").convert("RGB").resize((80, 80))
    usual = {"prompt": "a red circle", "images": [content, style], "seed": 7, "num_inference_steps": 4}
    return [np.asarray(image) for image in engine.generate(**{**usual, **fields}).images]


def researched(**options: Any) -> Case:
    return lambda engine: pixels_of(engine, research=ResearchOptions(**options))


def together(engine: USOEngine) -> Pixels:
    """Requests of several sizes and lengths, which come and go between each other's steps and take turns."""
    fields: list[dict[str, Any]] = [
        {},
        {"seed": 8, "image_size": {"width": 96, "height": 160}},
        {"images": [None, Image.new("RGB", (80, 80), "green")], "num_images": 2},
        {"negative_prompt": "blue", "true_cfg_scale": 3.0, "num_inference_steps": 6},
    ]
    with ThreadPoolExecutor(len(fields)) as pool:
        return [picture for found in pool.map(lambda given: pixels_of(engine, **given), fields) for picture in found]


def watched(engine: USOEngine) -> Pixels:
    """A caller who looks at every step, keeps what it sees and changes the latents."""
    seen = []

    def look(step: Step) -> None:
        seen.append(step.estimated_clean(0))
        step.latents[0].mul_(1.01)
        if step.index == 1:
            seen.append(torch.from_numpy(np.array(engine.preview(step))))

    pictures = pixels_of(engine, on_step=look)
    return [*pictures, *(tensor.cpu().numpy() for tensor in seen)]


def switched(engine: USOEngine, lora: Path) -> Pixels:
    """Other LoRAs and back, under graphs that read the weights where they are."""
    engine.set_loras([(lora, 0.7)])
    changed = pixels_of(engine, num_inference_steps=5)
    engine.set_loras([])
    return [*changed, *pixels_of(engine, num_inference_steps=5)]


def cases(lora: Path) -> dict[str, Case]:
    return {
        "six steps": lambda engine: pixels_of(engine, num_inference_steps=6),
        "two images": lambda engine: pixels_of(engine, num_images=2),
        "negative prompt": lambda engine: pixels_of(engine, negative_prompt="blue", true_cfg_scale=3.0),
        "together": together,
        "watched": watched,
        "LoRAs": lambda engine: switched(engine, lora),
        "LoRAs of a request": researched(loras=[(lora, 0.5)]),
        "merged padding": researched(text_padding="merge"),
        "a sampler that remembers": researched(sampler="unipc"),
        "the authors' numerics": researched(reference_numerics=True),
        "from the picture": researched(strength=0.6, posterior_seed=3, content_images=[Image.new("RGB", (64, 64), "red")]),
    }


NAMES = list(cases(Path()))


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    path, layer = tmp_path_factory.mktemp("lora") / "ink.safetensors", "transformer.single_transformer_blocks.0.attn.to_q"
    down, up = torch.ones(2, 192), torch.full((192, 2), 0.01)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    return cases(path)


@pytest.fixture(scope="module")
def expected(all_cases: dict[str, Case]) -> dict[str, Pixels]:
    """Every case on the CPU, before there is a GPU."""
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine:
        return {name: case(engine) for name, case in all_cases.items()}


@pytest.fixture(scope="module")
def gpus(expected: dict[str, Pixels]) -> Iterator[SimulatedGPUs]:
    with simulated_gpus() as simulated:
        yield simulated


def with_graphs(config: EngineConfig, mode: str) -> EngineConfig:
    return config.model_copy(update={"cuda_graphs": mode})


@pytest.fixture(scope="module")
def on_gpu(gpus: SimulatedGPUs) -> Iterator[USOEngine]:
    with USOEngine.from_config(with_graphs(config_of("float32"), "on"), device=SECOND) as engine:
        yield engine


@pytest.fixture(scope="module")
def streamed(gpus: SimulatedGPUs) -> Iterator[USOEngine]:
    """Every part and every layer comes from the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uso_engine.offload.placement.plan_memory", everything_streamed)
        made = USOEngine.from_config(config_of("float32"), device=SECOND, memory_budget_gib=4)
    with made as engine:
        yield engine


def assert_same(found: Pixels, wanted: Pixels) -> None:
    assert [picture.shape for picture in found] == [picture.shape for picture in wanted]
    assert all(np.array_equal(picture, other) for picture, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_the_cpus(name: str, on_gpu: USOEngine, all_cases: dict[str, Case], expected: dict[str, Pixels]) -> None:
    assert_same(all_cases[name](on_gpu), expected[name])


@pytest.mark.parametrize("name", ["two images", "together", "LoRAs", "merged padding"])
def test_pictures_are_the_cpus_where_weights_come_from_the_host(
    name: str, streamed: USOEngine, all_cases: dict[str, Case], expected: dict[str, Pixels]
) -> None:
    assert_same(all_cases[name](streamed), expected[name])


def waits_of_steps(gpus: SimulatedGPUs) -> Counter[str]:
    """Where steps made the host wait since the waits were cleared."""
    return Counter(where_in_step(wait) for wait in gpus.waits if "denoiser.step" in wait.frames)


def where_in_step(wait: Wait) -> str:
    return next(name for name in wait.frames if name.split(".")[0] in ("denoiser", "step_graph", "cuda_capture"))


def test_steps_wait_for_nothing(gpus: SimulatedGPUs, on_gpu: USOEngine) -> None:
    """But one that is captured: PyTorch empties its cache before, and the first repetition is compared. The pace is kept by
    waiting for the step before the last, outside."""
    before = on_gpu.statistics().graphs
    gpus.waits.clear()
    pixels_of(on_gpu, image_size={"width": 64, "height": 96}, num_inference_steps=6)
    after = on_gpu.statistics().graphs
    assert (after.captured - before.captured, after.replayed - before.replayed) == (1, 3)
    assert waits_of_steps(gpus) == {"cuda_capture.record": 1, "step_graph.__init__": 1}
    gpus.waits.clear()
    pixels_of(on_gpu, image_size={"width": 64, "height": 96}, num_inference_steps=6)
    assert on_gpu.statistics().graphs.replayed == after.replayed + 6
    assert not waits_of_steps(gpus)
    assert sum(wait.frames[:2] == ("stopwatch.wait", "loop._advance") for wait in gpus.waits) == 6


def test_steps_of_a_new_company_wait_for_its_tables(gpus: SimulatedGPUs, on_gpu: USOEngine) -> None:
    """Which rows are whose comes from the host, once for each company of requests."""
    gpus.waits.clear()
    together(on_gpu)
    assert set(waits_of_steps(gpus)) <= {
        "denoiser._form",
        "denoiser._guided_tables",
        "cuda_capture.record",
        "step_graph.__init__",
    }


@pytest.mark.parametrize(("tier", "most"), [("fp8", 4), ("int8", 4), ("int4", 12)])
def test_tiers(tier: str, most: float, gpus: SimulatedGPUs, expected: dict[str, Pixels]) -> None:
    """Two steps without a graph, the third as one and again, the others by its repetition. The picture is float32's but for the
    tier's error: as far off on average as on a CPU, 1 to 2 of 255 and in 4 bits 7; a broken one is off by 20 or more."""
    gpus.waits.clear()
    with USOEngine.from_config(with_graphs(config_of(tier), "on"), device=SECOND) as engine:
        (picture,) = pixels_of(engine, num_inference_steps=6)
        assert engine.statistics().graphs.replayed == 3
    assert waits_of_steps(gpus) == {"cuda_capture.record": 1, "step_graph.__init__": 1}
    assert np.abs(picture.astype(int) - expected["six steps"][0]).mean() < most


def test_bits_are_the_same_with_graphs_and_without(gpus: SimulatedGPUs) -> None:
    """In bfloat16, where every kernel rounds; steps of so small a model keep the host busier than a GPU, so they get one."""
    found = []
    for mode in ("off", "auto"):
        with USOEngine.from_config(with_graphs(config_of("bf16"), mode), device=SECOND) as engine:
            gpus.waits.clear()
            found.append(pixels_of(engine, num_inference_steps=6, negative_prompt="blue", true_cfg_scale=2.0))
            assert engine.statistics().graphs.replayed == (3 if mode == "auto" else 0)
            assert mode == "auto" or not waits_of_steps(gpus)
    assert_same(*found)


def test_reference_cases_are_rebuilt_on_a_gpu(gpus: SimulatedGPUs, repository: Path) -> None:
    """Of this thread, where another GPU than theirs is current."""
    assert torch.cuda.current_device() == 0
    checks = list(verify(repository / "tests" / "reference", VerifyOptions(device=SECOND)))
    assert len(checks) > 80
    assert [check for check in checks if not check.is_within] == []


def test_a_table_that_stays_on_the_host_is_found(on_gpu: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Ragged.pack
    monkeypatch.setattr(Ragged, "pack", lambda lengths, device="cpu", **given: pack(lengths, "cpu", **given))
    with pytest.raises((DeviceFault, ValueError), match=r"on cuda:1|same device"):
        pixels_of(on_gpu, image_size={"width": 64, "height": 160})  # Of no graph that reads tables of its own.


def test_a_question_in_a_step_is_found(gpus: SimulatedGPUs, on_gpu: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and no such step can be captured."""
    forward = Transformer.forward

    def asking(transformer: Transformer, run: Run, latents: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        velocity = forward(transformer, run, latents, modulation)
        return velocity if bool(velocity.isfinite().all()) else latents

    monkeypatch.setattr(Transformer, "forward", asking)
    size = {"width": 192, "height": 64}
    gpus.waits.clear()
    pixels_of(on_gpu, image_size=size, num_inference_steps=2)
    assert waits_of_steps(gpus) == {"denoiser._velocity": 2}
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        pixels_of(on_gpu, image_size=size)


def test_weights_that_wait_in_memory_that_is_not_pinned_are_found(streamed: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulated_gpu.is_pinned", lambda tensor: False)
    with pytest.raises(DeviceFault, match="not pinned is said not to block"):
        pixels_of(streamed)
