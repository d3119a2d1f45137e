"""uso-tiny: complete, ours, offline, through the same classes and loaders as the real model."""

import filecmp
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTokenizer, T5Tokenizer

from uso_engine.config import EngineConfig, load_config
from uso_engine.embedded.build import FOLDER, weight_files, write_encoder_configs, write_random_weights, write_tokenizers
from uso_engine.embedded.corpus import captions
from uso_engine.model.params import TransformerParams
from uso_engine.weights.lora import read_lora
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

CAPTIONS = list(captions(300, seed=99))
PROSE = (
    "The quick brown fox jumps over the lazy dog!",
    "Naïve façades, crème brûlée & “smörgåsbord” – it's 50 % off…",
    "photorealistic, 85mm f/1.4, ultra-detailed; trending (8k) [masterpiece] {best quality} <lora:x:0.8> #1 @home a|b ~ ^ `",
)


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return load_config("uso-tiny")


@pytest.fixture(scope="module")
def t5() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(FOLDER / "t5", local_files_only=True)


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FOLDER / "clip", local_files_only=True)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def test_every_weight_file_has_the_names_and_shapes_of_its_configuration(config: EngineConfig) -> None:
    files = weight_files(FOLDER, config)
    assert len(files) == 7
    for path, (_, shapes) in files.items():
        stored = stored_shapes(path)
        if path.name == "dit_lora.safetensors":
            # The rank is the trainer's choice; which layers have a pair is not.
            assert set(stored) == set(shapes)
        else:
            assert stored == {key: tuple(shape) for key, shape in shapes.items()}


def test_weights_are_finite_and_say_where_they_come_from(config: EngineConfig) -> None:
    for path in weight_files(FOLDER, config):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["origin"]
            assert all(bool(torch.isfinite(file.get_tensor(key).float()).all()) for key in file.keys())  # noqa: SIM118


def test_transformer_lora_projector_and_autoencoder_take_at_most_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 12_000_000


def test_tokenizers_take_less_than_300_kilobytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("tokenizer*.json")) < 300_000


def test_the_folder_says_that_all_of_it_is_ours() -> None:
    assert "Everything in this folder is this project's own" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_base_and_the_lora_go_through_the_common_loaders(config: EngineConfig) -> None:
    params = config.transformer.params
    source = open_transformer_checkpoint(FOLDER / "flux1-tiny.safetensors", params)
    lora = read_lora(FOLDER / "dit_lora.safetensors", params)
    try:
        assert set(lora.updates) <= set(source.keys())
        # q/k/v and projection of both streams in a double block, linear1 and linear2 in a single block.
        assert len(lora.updates) == 4 * params.depth + 2 * params.depth_single_blocks
    finally:
        source.close()


def test_built_again_it_is_the_same(config: EngineConfig, tmp_path: Path) -> None:
    vocabularies = write_tokenizers(tmp_path)
    write_encoder_configs(tmp_path, config, vocabularies)
    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert len(built) == 8
    _, different, errors = filecmp.cmpfiles(FOLDER, tmp_path, [str(path) for path in built], shallow=False)
    assert (different, errors) == ([], [])


def test_random_weights_are_written_through_and_through(config: EngineConfig, tmp_path: Path) -> None:
    write_encoder_configs(tmp_path, config, write_tokenizers(tmp_path))
    write_random_weights(tmp_path, config)
    for path, (_, shapes) in weight_files(tmp_path, config).items():
        assert stored_shapes(path) == dict(shapes)
    with safe_open(tmp_path / "flux1-tiny.safetensors", framework="pt") as file:
        weight = file.get_tensor("double_blocks.0.img_attn.qkv.weight")
    assert weight.dtype == torch.bfloat16
    assert abs(float(weight.float().std()) * weight.shape[1] ** 0.5 - 1) < 0.02


def test_head_width_is_one_that_the_kernels_know(config: EngineConfig) -> None:
    assert config.transformer.params.head_dim in (64, 128)


def test_t5_gives_a_caption_one_piece_per_word_and_no_unknown(t5: T5Tokenizer) -> None:
    pieces = words = 0
    for caption in CAPTIONS:
        ids = t5(caption)["input_ids"]
        assert t5.unk_token_id not in ids
        assert ids[-1] == t5.eos_token_id
        pieces += len(ids) - 1
        words += len(re.findall(r"\w+(?:-\w+)*|[^\w\s]", caption))
    assert pieces <= 1.1 * words


def test_captions_fit_the_text_length(config: EngineConfig, t5: T5Tokenizer) -> None:
    assert config.t5 is not None
    assert max(len(t5(caption)["input_ids"]) for caption in CAPTIONS) <= config.t5.max_length


@pytest.mark.parametrize("text", PROSE)
def test_prose_has_no_unknown_piece_and_survives_the_round_trip(t5: T5Tokenizer, clip: CLIPTokenizer, text: str) -> None:
    ids = t5(text)["input_ids"]
    assert t5.unk_token_id not in ids
    assert t5.decode(ids, skip_special_tokens=True) == text
    back = str(clip.decode(clip(text)["input_ids"], skip_special_tokens=True))
    assert re.sub(r"\s", "", back) == re.sub(r"\s", "", text.lower())


def test_other_scripts_are_unknown_to_t5_alone(t5: T5Tokenizer, clip: CLIPTokenizer) -> None:
    text = "日本語 🙂"
    assert t5.unk_token_id in t5(text)["input_ids"]
    assert clip.decode(clip(text)["input_ids"], skip_special_tokens=True) == text


def test_case_matters_to_t5_and_not_to_clip(t5: T5Tokenizer, clip: CLIPTokenizer) -> None:
    assert t5("Tree")["input_ids"] != t5("tree")["input_ids"]
    assert clip("Tree")["input_ids"] == clip("tree")["input_ids"]


def test_special_ids_are_the_real_ones(t5: T5Tokenizer, clip: CLIPTokenizer) -> None:
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert t5("")["input_ids"] == [1]
    # CLIP's markers are its two highest ids, and it pads with the second.
    assert clip("")["input_ids"] == [len(clip) - 2, len(clip) - 1]
    assert clip.pad_token_id == clip.eos_token_id == len(clip) - 1


def test_captions_depend_on_the_seed_alone() -> None:
    assert list(captions(50, seed=4)) == list(captions(50, seed=4))
    assert list(captions(50, seed=4)) != list(captions(50, seed=5))


@pytest.mark.parametrize("name", ["uso-flux-dev", "uso-flux-krea-dev"])
def test_full_size_configurations_name_the_real_model(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert not config.demonstration
    assert config.transformer.params == TransformerParams()
    assert config.transformer.params.guidance_embed
    assert config.projector is not None
    assert config.autoencoder is not None
    assert config.t5 is not None
    assert config.clip is not None
    assert (config.projector.vision_tokens, config.projector.vision_width, config.projector.style_tokens) == (729, 1152, 64)
    assert (config.t5.max_length, config.clip.max_length) == (512, 77)
    assert config.t5.tokenizer is not None
    assert config.t5.tokenizer.endswith(":tokenizer_2")
    assert (config.autoencoder.params.scale_factor, config.autoencoder.params.shift_factor) == (0.3611, 0.1159)
    assert config.loras[0].path == "bytedance-research/USO:uso_flux_v1.0/dit_lora.safetensors"
    assert config.loras[0].weight == 1.0


def test_the_small_configuration_makes_requests_small(config: EngineConfig) -> None:
    assert config.demonstration
    assert (config.defaults.width, config.defaults.height, config.content.long_side) == (128, 128, 128)
    assert config.limits.min_side <= 128
