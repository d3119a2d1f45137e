"""Configurations: what is accepted, and what the message says where it is not."""

import tomllib
from pathlib import Path

import pytest

from uso_engine.config import EngineConfig, config_folder, list_configs, load_config, parse_config
from uso_engine.errors import ConfigError, MissingFileError

MINIMAL = {"name": "x", "transformer": {"checkpoint": "a.safetensors"}}


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_configuration_loads(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.description
    assert config.base_folder == config_folder().resolve()


def test_defaults_are_flux_dev_and_the_hosted_api() -> None:
    config = parse_config(MINIMAL)
    params = config.transformer.params
    assert (params.hidden_size, params.depth, params.depth_single_blocks, params.head_dim) == (3072, 19, 38, 128)
    assert (config.defaults.steps, config.defaults.guidance, config.content.long_side) == (28, 4.0, 512)
    assert (config.limits.min_side, config.limits.max_side, config.limits.max_pixels) == (256, 2048, 4_194_304)
    assert load_config("uso-flux-dev").transformer.params == params


def test_settings_are_frozen() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.transformer.checkpoint = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("table", "messages"),
    [
        ({**MINIMAL, "lora": []}, ["unknown key 'lora'; did you mean 'loras'?"]),
        ({**MINIMAL, "transformer": {"checkpont": "a"}}, ["transformer.checkpoint is required", "did you mean 'checkpoint'"]),
        ({**MINIMAL, "loras": [{"path": "a", "wieght": 1}]}, ["unknown key 'loras.0.wieght'; did you mean 'weight'?"]),
        (
            {**MINIMAL, "transformer": {"checkpoint": "a", "params": {"hiden_size": 1}}},
            ["'hiden_size'; did you mean 'hidden_size'?"],
        ),
        (
            {**MINIMAL, "transformer": {"checkpoint": "a", "params": {"hidden_size": 100}}},
            ["100 is not a multiple of num_heads 24"],
        ),
        ({**MINIMAL, "defaults": {"steps": 99}}, ["defaults.steps", "50", "99"]),
        ({**MINIMAL, "limits": {"min_side": 512, "max_side": 256}}, ["expected 16 <= min_side <= max_side, got 512 and 256"]),
        ({**MINIMAL, "limits": {"min_side": 512, "max_pixels": 1000}}, ["max_pixels 1000 is less than the smallest image"]),
        ({**MINIMAL, "safety": {"threshold": 1.5}}, ["safety.threshold", "1.5"]),
        ({**MINIMAL, "vision": {"folder": "v"}}, ["[projector] and [vision] come together"]),
        ({**MINIMAL, "t5": {"folder": "t", "max_length": 512}}, ["[t5] and [clip] come together"]),
        ({**MINIMAL, "precision": {"tier": "fp4"}}, ["precision.tier", "'fp4'"]),
        ({"name": "x"}, ["transformer is required"]),
    ],
)
def test_mistakes_are_named(table: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    for message in messages:
        assert message in str(caught.value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "defaults": {"steps": 0, "widht": 1}, "catche": {}})
    assert all(word in str(caught.value) for word in ("defaults.steps", "'width'", "'cache'"))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="did you mean 'uso-tiny'"):
        load_config("uso-tinny")
    path = tmp_path / "broken.toml"
    path.write_text("name = ", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml is not a TOML file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)
    path.write_text('base_folder = "/"\n[transformer]\ncheckpoint = "a"', encoding="utf-8")
    with pytest.raises(ConfigError, match="base_folder is not a setting"):
        load_config(path)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[transformer]\ncheckpoint = "weights/a.safetensors"', encoding="utf-8")
    config = load_config(path)
    assert config.name == "mine"
    assert config.base_folder == tmp_path.resolve()


def test_toml_files_hold_only_deviations() -> None:
    defaults = parse_config(MINIMAL).model_dump()
    for name in list_configs():
        table = tomllib.loads((config_folder() / f"{name}.toml").read_text(encoding="utf-8"))
        for key in ("defaults", "limits", "content", "cache", "precision"):
            repeated = {k: v for k, v in table.get(key, {}).items() if defaults[key].get(k) == v}
            assert repeated == {}, f"{name}: {key} repeats defaults"
    assert isinstance(parse_config(MINIMAL), EngineConfig)
