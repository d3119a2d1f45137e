"""The table of tiers, and that everything which lists tiers has every row of it."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.memory.plans import TIER_CONFIGS
from benchmarks.tiers.errors import variants
from uso_engine.cli.app import app
from uso_engine.cli.tiers import QuantizedTierChoice, TierChoice, chosen_tier
from uso_engine.config import PrecisionConfig, load_config, parse_config
from uso_engine.errors import BackendError, ConfigError
from uso_engine.loading.transformer import save_quantized_transformer
from uso_engine.offload.budget import public_sizes
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.precision.tiers import (
    FLOAT_TIERS,
    QUANTIZED_TIERS,
    TIERS,
    Format,
    TextTierName,
    TierName,
    linear_classes,
    tiers_of_gpu,
)
from uso_engine.precision.transformer import DTYPES, check_tier, layer_formats, quantized_transformer
from uso_engine.verification.measure import bound_for
from uso_engine.verification.small_model import small_params

MINIMAL = {"name": "x", "transformer": {"checkpoint": "a.safetensors"}}


def test_names_for_type_checkers_are_those_of_the_table() -> None:
    assert get_args(TierName) == tuple(TIERS)
    assert set(get_args(TextTierName)) == {name for name, tier in TIERS.items() if tier.text_encoder is not None}
    assert set(get_args(Format)) == {"float", *linear_classes()}
    assert set(DTYPES) == set(FLOAT_TIERS) == {tier.dtype for tier in TIERS.values()}
    assert len(FLOAT_TIERS) + len(QUANTIZED_TIERS) == len(TIERS)


def test_layers_of_formats_say_what_a_product_takes() -> None:
    """A weight that is multiplied as it is needs rows of its own type; any other is turned back, which takes memory."""
    for name, layer_class in linear_classes().items():
        assert issubclass(layer_class, QuantizedLinear)
        assert layer_class.restores_weight == (layer_class.takes is None), name


@pytest.mark.parametrize("name", TIERS)
def test_every_tier_can_be_configured_and_chosen(name: TierName, tmp_path: Path) -> None:
    assert parse_config({**MINIMAL, "precision": {"tier": name}}).precision.tier == name
    assert chosen_tier(TierChoice(name)) == name
    # An empty folder is reached only if the option is understood.
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--tier", name])
    assert (result.exit_code, "no reference cases" in result.output.replace("\n", " ")) == (1, True), result.output
    for option in ("--tier-a", "--tier-b"):
        result = CliRunner().invoke(app, ["compare", "nowhere", "nowhere", option, name, "--out", str(tmp_path / "out")])
        assert (result.exit_code, "no configuration named" in result.output) == (1, True), result.output
    quantise = CliRunner().invoke(app, ["quantize", "nowhere", "--tier", name, "--out", str(tmp_path / "out")])
    assert quantise.exit_code == (1 if name in QUANTIZED_TIERS else 2), quantise.output
    assert (name in list(QuantizedTierChoice)) == (name in QUANTIZED_TIERS)


def test_names_that_are_no_tiers_are_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision.tier: Input should be " + ".*".join(map(repr, TIERS)) + ", got 'int2'"):
        parse_config({**MINIMAL, "precision": {"tier": "int2"}})
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--tier", "int2"])
    assert result.exit_code == 2
    assert all(name in result.output for name in TIERS)
    for name in FLOAT_TIERS.values():
        with pytest.raises(ValueError, match=f"a quantised file is in fp8, .*, got '{name}'"):
            save_quantized_transformer(load_config("uso-tiny"), name, tmp_path / "file")


@pytest.mark.parametrize("name", TIERS)
def test_every_tier_has_a_model_sizes_and_bounds(name: TierName) -> None:
    params, tier = small_params(guidance_embed=True), TIERS[name]
    formats = layer_formats(params, name)
    assert (set(formats.values()) == {"float"}) == (name not in QUANTIZED_TIERS)
    assert set(formats.values()) <= {"float", tier.blocks, tier.sensitive, tier.modulation}
    module = quantized_transformer(params, formats, dtype=DTYPES[tier.dtype])
    assert module.img_in.weight.dtype == DTYPES[tier.dtype]
    kept = {found: type(module.get_submodule(layer)) for layer, found in formats.items() if found != "float"}
    assert kept == {found: linear_classes()[found] for found in kept}
    bounds = bound_for("velocity.0", name, 3), bound_for("latents.3", name, 3)
    assert bounds == (tier.velocity_bound, tier.latent_bound)
    assert (bound_for("latents.1", name, 3) is not None) == tier.is_exact
    config = load_config("uso-flux-dev")
    sizes = {other: public_sizes(config, other).transformer for other in (name, FLOAT_TIERS["float32"])}
    assert 0 < sizes[name].total <= sizes["float32"].total
    assert (sizes[name].scratch > 0) == any(
        kind != "float" and linear_classes()[kind].restores_weight for kind in formats.values()
    )


@pytest.mark.parametrize("name", [name for name, tier in TIERS.items() if tier.text_encoder is not None])
def test_every_text_tier_can_be_configured_and_has_a_size(name: TextTierName) -> None:
    config = load_config("uso-flux-dev").model_copy(update={"precision": PrecisionConfig(text_encoder=name)})
    t5 = public_sizes(config, "bf16").components["T5"]
    chosen = TIERS[name].text_encoder
    assert chosen is not None
    assert (t5.weight_bytes < 6e9) == (chosen != "float")
    assert (t5.working_bytes > 4e8) == (chosen != "float" and linear_classes()[chosen].restores_weight)


def test_what_a_gpu_is_too_old_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    for name, tier in TIERS.items():
        generation, (major, minor) = tier.oldest_gpu
        assert name in tiers_of_gpu((major, minor)) and name in tiers_of_gpu((99, 0))
        if major == 0:
            continue
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major - 1, 9))
        message = (
            rf"'{name}' needs compute capability {major}\.{minor} \({generation}\) or newer, an old GPU has {major - 1}\.9; .*"
        )
        with pytest.raises(BackendError, match=message + "work here: float32"):
            check_tier(name, torch.device("cuda"))


def test_every_quantised_tier_has_a_configuration_and_is_measured() -> None:
    assert [load_config(name).precision.tier for name in TIER_CONFIGS] == ["bf16", *QUANTIZED_TIERS]
    assert set(variants(small_params(guidance_embed=True))) >= {"bf16", *QUANTIZED_TIERS}
