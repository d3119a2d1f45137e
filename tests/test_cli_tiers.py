"""Precision tiers from the command line: quantise, load, compare, plan."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run
from PIL import Image

from uso_engine import USOEngine, load_config
from uso_engine.config import EngineConfig
from uso_engine.errors import CheckpointError, ConfigError, MissingFileError
from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS
from uso_engine.verification.measure import relative_error


def tiny(tier: str, checkpoint: Path | None = None) -> EngineConfig:
    config = load_config("uso-tiny")
    transformer = (
        config.transformer if checkpoint is None else config.transformer.model_copy(update={"checkpoint": str(checkpoint)})
    )
    return config.model_copy(
        update={"transformer": transformer, "precision": config.precision.model_copy(update={"tier": tier})}
    )


def latents(config: EngineConfig) -> torch.Tensor:
    with USOEngine.from_config(config, device="cpu") as engine:
        result = engine.generate(prompt="a cup", seed=3, image_size={"width": 64, "height": 64}, num_inference_steps=2)
    assert result.latents is not None
    return result.latents


@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_a_quantised_file_is_the_tier_it_was_made_for(tier: str, tmp_path: Path) -> None:
    code, printed = run("quantize", "uso-tiny", "--tier", tier, "--out", str(tmp_path / "new"))
    assert code == 0, printed
    path = tmp_path / "new" / f"uso-tiny-{tier}.safetensors"
    assert str(path) in printed.replace(" ", "")
    on_the_way, from_file = latents(tiny(tier)), latents(tiny(tier, path))
    assert torch.equal(on_the_way, from_file)
    exact = latents(tiny("float32"))
    error = relative_error(from_file, exact)
    assert 1e-4 < error < 0.3
    code, printed = run("quantize", "uso-tiny", "--tier", tier, "--out", str(tmp_path / "new"))
    assert code == 1
    assert "is there already" in printed


def test_a_quantised_file_is_refused_where_it_does_not_belong(tmp_path: Path) -> None:
    code, printed = run("quantize", "uso-tiny", "--tier", "int8", "--out", str(tmp_path))
    assert code == 0, printed
    path = tmp_path / "uso-tiny-int8.safetensors"
    with pytest.raises(CheckpointError, match="precision tier is int8, the configuration has fp8"):
        USOEngine.from_config(tiny("fp8", path), device="cpu")
    with pytest.raises(ConfigError, match="is a quantised transformer; set"):
        USOEngine.from_config(tiny("bf16", path), device="cpu")
    without = tiny("int8", path).model_copy(update={"loras": ()})
    with pytest.raises(CheckpointError, match="merged LoRAs are"):
        USOEngine.from_config(without, device="cpu")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        USOEngine.from_config(tiny("int8", path), device="cpu")
    path.write_bytes(data[:-64] + bytes(64))
    with pytest.raises(CheckpointError):
        USOEngine.from_config(tiny("int8", path), device="cpu")


def test_text_encoder_in_8_bits() -> None:
    config = load_config("uso-tiny")
    plain = latents(config)
    for precision in (name for name, tier in TIERS.items() if tier.text_encoder not in (None, "float")):
        changed = config.model_copy(update={"precision": config.precision.model_copy(update={"text_encoder": precision})})
        other = latents(changed)
        assert not torch.equal(other, plain)
        assert relative_error(other, plain) < 0.1


def test_compare_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    request = {"prompt": "a cup", "seed": 3, "image_size": {"width": 64, "height": 64}, "num_inference_steps": 2}
    requests.write_text(json.dumps(request), encoding="utf-8")
    code, printed = run(
        "compare", "uso-tiny", "uso-tiny", "--tier-a", "int8", "--tier-b", "float32", "--requests", str(requests),
        "--out", str(tmp_path / "report"), "--device", "cpu",
    )  # fmt: skip
    assert code == 0, printed
    assert "uso-tiny in int8 against uso-tiny in float32" in printed
    assert "noise floor: uso-tiny in bf16 against uso-tiny in float32" in printed
    with Image.open(tmp_path / "report" / "comparison.png") as picture:
        assert picture.size == (3 * 64 + 16, 64)
    assert json.loads((tmp_path / "report" / "comparison.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["uso-flux-dev", *(f"uso-flux-dev-{tier}" for tier in QUANTIZED_TIERS)])
def test_info_plans_memory_without_weights_or_a_gpu(name: str) -> None:
    code, printed = run("info", name)
    assert code == 0, printed
    for budget in (24, 16, 12, 8):
        assert f"budget {budget}.0 GiB: " in printed
    assert "on the GPU: transformer" in printed
    code, printed = run("info", name, "--budget", "1")
    assert "too small" in printed
    code, printed = run("info", name, "--budget", "-1")
    assert code == 2


def test_originals_are_needed_for_other_loras_only(tmp_path: Path) -> None:
    code, printed = run("quantize", "uso-tiny", "--tier", "int8", "--out", str(tmp_path))
    assert code == 0, printed
    with USOEngine.from_config(tiny("int8", tmp_path / "uso-tiny-int8.safetensors"), device="cpu") as engine:
        with pytest.raises(MissingFileError, match="nowhere"):
            engine.set_loras([(tmp_path / "nowhere.safetensors", 1.0)])
        before = engine.generate(prompt="x", seed=1, num_inference_steps=1).images[0].tobytes()
        engine.set_loras([], keep_configured=False)
        without = engine.generate(prompt="x", seed=1, num_inference_steps=1).images[0].tobytes()
        engine.set_loras([])
        assert engine.generate(prompt="x", seed=1, num_inference_steps=1).images[0].tobytes() == before
        assert without != before


def test_compare_with_a_quantised_file_names_the_flag_that_helps(tmp_path: Path, repository: Path) -> None:
    code, printed = run("quantize", "uso-tiny", "--tier", "int8", "--out", str(tmp_path))
    assert code == 0, printed
    text = (repository / "configs" / "uso-tiny.toml").read_text(encoding="utf-8")
    text = text.replace('checkpoint = "embedded:uso-tiny/flux1-tiny.safetensors"', 'checkpoint = "uso-tiny-int8.safetensors"')
    path = tmp_path / "quantised.toml"
    path.write_text(f'{text}\n[precision]\ntier = "int8"\n', encoding="utf-8")
    common = ("--out", str(tmp_path / "report"), "--device", "cpu")
    code, printed = run("compare", "uso-tiny", str(path), *common)
    assert (code, "give --no-floor" in printed, "running" in printed) == (2, True, False), printed
    code, printed = run("compare", str(path), "uso-tiny", "--tier-a", "bf16", *common)
    assert (code, "leave --tier-a out" in printed) == (2, True), printed
    requests = tmp_path / "requests.jsonl"
    request = {"prompt": "a cup", "seed": 3, "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
    requests.write_text(json.dumps(request), encoding="utf-8")
    code, printed = run("compare", "uso-tiny", str(path), "--no-floor", "--requests", str(requests), *common)
    assert code == 0, printed
