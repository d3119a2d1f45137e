"""Numbers in a configuration that cannot be: refused with file and key, before anything is made of them."""

from pathlib import Path

import pytest

from uso_engine.config import load_config
from uso_engine.errors import ConfigError, MissingFileError

# Every numeric setting: its table and key, a value that is accepted, and the first ones beyond its bounds.
NUMBERS = [
    ("loras.0", "weight", 0.5, -1e39, 1e39),
    ("projector", "vision_tokens", 729, 0, 10**8),
    ("projector", "vision_width", 1152, 0, 10**8),
    ("projector", "style_tokens", 64, 0, 10**8),
    ("t5", "max_length", 512, 1, 10**9),
    ("clip", "max_length", 77, 1, 10**9),
    ("autoencoder", "tile_side", 512, 8, 10**9),
    ("content", "long_side", 512, 8, 10**9),
    ("defaults", "width", 1024, 8, 10**9),
    ("defaults", "height", 1024, 8, 10**9),
    ("defaults", "steps", 28, 0, 51),
    ("defaults", "guidance", 4.0, 0.5, 21),
    ("limits", "min_side", 256, 8, 10**9),
    ("limits", "max_side", 2048, 8, 10**9),
    ("limits", "max_pixels", 4_194_304, 100, 10**12),
    ("safety", "threshold", 0.5, 0.0, 1.0),
    ("cache", "prompt_mib", 256.0, -1, 1e12),
    ("cache", "style_mib", 64.0, -1, 1e12),
    ("cache", "content_mib", 64.0, -1, 1e12),
    ("", "memory_budget_gib", 8.0, 0, 1e9),
    ("transformer.params", "in_channels", 64, 0, 10**8),
    ("transformer.params", "vec_in_dim", 768, 0, 10**8),
    ("transformer.params", "context_in_dim", 4096, 0, 10**8),
    ("transformer.params", "hidden_size", 3072, 0, 10**8),
    ("transformer.params", "mlp_ratio", 4.0, 0, 1e9),
    ("transformer.params", "num_heads", 24, 0, 10**8),
    ("transformer.params", "depth", 19, 0, 10**8),
    ("transformer.params", "depth_single_blocks", 38, 0, 10**8),
    ("transformer.params", "theta", 10_000, 0, 10**18),
    ("autoencoder.params", "ch", 128, 0, 10**8),
    ("autoencoder.params", "num_res_blocks", 2, 0, 10**8),
    ("autoencoder.params", "z_channels", 16, 0, 10**8),
    ("autoencoder.params", "scale_factor", 0.3611, 0.0, 1e30),
    ("autoencoder.params", "shift_factor", 0.1159, -1e30, 1e30),
    ("autoencoder.params", "in_channels", 3, 0, 10**8),
    ("autoencoder.params", "out_ch", 3, 0, 10**8),
    ("autoencoder.params", "resolution", 256, 0, 10**8),
    ("autoencoder.params", "norm_groups", 32, 0, 10**8),
]
REQUIRED = {
    "loras.0": ["path"],
    "projector": ["checkpoint"],
    "vision": ["folder"],
    "t5": ["folder", "max_length"],
    "clip": ["folder", "max_length"],
    "autoencoder": ["checkpoint"],
}


def toml(table: str, key: str, value: str) -> str:
    """A configuration that is complete, with one value set."""
    tables: dict[str, dict[str, str]] = {"transformer": {"checkpoint": '"a"'}}
    needed = {"projector": ["projector", "vision"], "t5": ["t5", "clip"], "clip": ["t5", "clip"]}
    for name in needed.get(table.split(".params")[0], [table.removesuffix(".params")]):
        tables.setdefault(name, {}).update(
            {entry: "77" if entry == "max_length" else '"x"' for entry in REQUIRED.get(name, [])}
        )
    tables.setdefault(table, {})[key] = value
    lines = [f"{name} = {entry}" for name, entry in tables.pop("", {}).items()]
    for name, entries in tables.items():
        lines.append("[[loras]]" if name == "loras.0" else f"[{name}]")
        lines += [f"{entry} = {text}" for entry, text in entries.items()]
    return "\n".join(lines)


def refusal(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 1_000
    return message


@pytest.mark.parametrize(("table", "key", "good", "low", "high"), NUMBERS, ids=lambda value: str(value))
def test_every_number_has_a_type_and_bounds(table: str, key: str, good: float, low: float, high: float, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml(table, key, str(good)), encoding="utf-8")
    load_config(path)
    bad = [low, high, f'"{good}"', "true", "nan", "inf", "-inf", "[1]", "{a = 1}", "2026-01-01", f"0x{1 << 20_000:x}"]
    if isinstance(good, int):
        bad += [f"{good}.0", 10**30]
    for value in bad:
        message = refusal(path, toml(table, key, str(value)))
        assert key in message, (value, message)


@pytest.mark.parametrize("axes", ["[16, 56]", "[16, 56.0, 56]", "[true, 63, 64]", '"16"', "[]", "[1000000000, 2, 2]"])
def test_lists_of_sizes_are_checked(axes: str, tmp_path: Path) -> None:
    assert "axes_dim" in refusal(tmp_path / "c.toml", toml("transformer.params", "axes_dim", axes))
    assert "ch_mult" in refusal(tmp_path / "c.toml", toml("autoencoder.params", "ch_mult", axes.replace("[16, 56]", "[0]")))


@pytest.mark.parametrize(
    ("table", "key"), [("transformer.params", "qkv_bias"), ("safety", "forbid_disabling"), ("", "demonstration")]
)
@pytest.mark.parametrize("value", ["1", '"yes"', "0.0"])
def test_switches_are_true_or_false(table: str, key: str, value: str, tmp_path: Path) -> None:
    assert key in refusal(tmp_path / "c.toml", toml(table, key, value))


def test_strips_need_no_whole_latent_cells(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml("autoencoder", "tile_side", "500"), encoding="utf-8")
    section = load_config(path).autoencoder
    assert section is not None and section.tile_side == 500
    assert "autoencoder.tile_side" in refusal(path, toml("autoencoder", "tile_side", "15"))


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "[" * 100_000 + "]" * 100_000,
        "a = " + "{b = " * 5_000 + "1" + "}" * 5_000,
        "a = " + "9" * 100_000,
        "[" + ".".join(["a"] * 20_000) + "]",
        '"' + "k" * 100_000 + '" = 1',
        "\n".join(f"a{n} = 1" for n in range(10_000)),
        "[transformer]\ncheckpoint = [" + "[" * 300 + "]" * 300 + "]",
        "[[loras]]\npath = 'a'\n" * 65 + "[transformer]\ncheckpoint = 'a'",
    ],
    ids=lambda text: str(text[:12]),
)
def test_files_that_are_too_deep_long_or_many(text: str, tmp_path: Path) -> None:
    refusal(tmp_path / "c.toml", text)


def test_a_file_of_weights_is_not_read_as_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a TOML file: 1,099,511,627,776 bytes are too many"):
        load_config(path)


def test_what_names_no_file(tmp_path: Path) -> None:
    for name in ("a\0b", "n" * 5_000, "~nobody-of-this-name/x.toml", str(tmp_path)):
        with pytest.raises(MissingFileError, match="configuration"):
            load_config(name)
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    with pytest.raises(MissingFileError, match="no such file"):
        load_config(loop)
    with pytest.raises(ConfigError, match="got dict"):
        load_config({"name": "x"})  # type: ignore[arg-type]
