import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import TINY, copied, edit_json, edit_weights
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from uso_engine.conditioning.pretrained import fingerprint, load_pretrained
from uso_engine.errors import CheckpointError, MissingFileError


def load(folder: Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    return load_pretrained(
        T5EncoderModel,
        folder,
        what="T5 text encoder",
        model_types=("t5",),
        harmless=("decoder.", "lm_head.weight"),
        dtype=dtype,
        device="cpu",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("t5", tmp_path)


def shard(folder: Path) -> list[Path]:
    """Cut a folder's weights into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[index % 2] for index, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [folder / name for name in names]


def test_every_weight_is_the_file_s(folder: Path) -> None:
    model = load(folder)
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in stored.items())
    assert torch.equal(loaded["encoder.embed_tokens.weight"], loaded["shared.weight"])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_embedding_stored_once_is_found_whatever_the_configuration_says_of_tying(folder: Path) -> None:
    """FLUX.1-dev's text_encoder_2 says tie_word_embeddings false and has shared.weight alone."""
    edit_json(folder / "config.json", tie_word_embeddings=False, is_encoder_decoder=True)
    state = load(folder).state_dict()
    assert torch.equal(state["encoder.embed_tokens.weight"], state["shared.weight"])


def test_missing_weights_are_listed_instead_of_drawn(folder: Path) -> None:
    absent = ["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"]
    edit_weights(folder, lambda tensors: [tensors.pop(key) for key in absent])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert all(f"{key} is missing" in str(caught.value) for key in absent)


def test_missing_and_misshapen_weights_are_listed_together(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(64, 5)
        del tensors["encoder.final_layer_norm.weight"]

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=r"final_layer_norm.weight is missing; .*wo.weight has shape \[64, 5\]"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.scale_weight", "fp8 with separate scales"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight_scale", "fp8 with separate scales"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight.absmax", "bitsandbytes"),
        ("encoder.block.0.layer.0.SelfAttention.q.qzeros", "GPTQ or AWQ"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight._scale", "optimum-quanto"),
        ("encoder.block.0.layer.0.SelfAttention.q.multiplier", r"1 key left over: encoder\.block\.0\..*\.multiplier"),
    ],
)
def test_left_over_keys_are_refused(folder: Path, key: str, reason: str) -> None:
    """What is left over may be what the weights have to be multiplied with."""
    edit_weights(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=rf"T5 text encoder in .*{reason}"):
        load(folder)


def test_scaled_fp8_weights_are_refused_and_plain_ones_read(folder: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items() if "block" in key})

    edit_weights(folder, narrow)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(load(folder).state_dict()[key], value.float()) for key, value in stored.items())
    edit_weights(folder, lambda tensors: tensors.update(scaled_fp8=torch.zeros(2, dtype=torch.float8_e4m3fn)))
    with pytest.raises(CheckpointError, match=r"fp8 with separate scales.*or name the file itself.*t5.model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "quanto", "torchao", "of-next-year"])
def test_a_quantised_folder_is_refused_by_name(folder: Path, method: str) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"quantised by {method} \(quantization_config in config.json\)"):
        load(folder)


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["shared.weight"].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"infinite or not a number in shared\.weight"):
        load(folder)
    edit_weights(folder, lambda tensors: tensors.update({"shared.weight": tensors["shared.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"1 key of another type than floating point: shared\.weight"):
        load(folder)


def test_a_whole_t5_is_read_for_its_encoder(folder: Path) -> None:
    """google/t5-v1_1-xxl has the decoder, its output layer and both copies of the embedding."""
    before = load(folder).state_dict()

    def whole(tensors: dict[str, torch.Tensor]) -> None:
        shared = tensors["shared.weight"]
        tensors["encoder.embed_tokens.weight"] = shared.clone()
        tensors["decoder.embed_tokens.weight"] = shared.clone()
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(4, 4)
        tensors["lm_head.weight"] = shared.clone()

    edit_weights(folder, whole)
    after = load(folder).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 10**8}, "num_layers = 100000000"),
        ({"d_model": 10**9}, "d_model = 1000000000"),
        ({"vocab_size": 9_000_000, "d_model": 9_000}, r"81\d{9} parameters, the files have \d+ bytes"),
    ],
)
def test_sizes_of_no_model_are_refused_before_they_are_allocated(folder: Path, sizes: dict[str, int], message: str) -> None:
    edit_json(folder / "config.json", **sizes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_shards_are_read(folder: Path) -> None:
    whole = load(folder).state_dict()
    shard(folder)
    assert all(torch.equal(whole[key], value) for key, value in load(folder).state_dict().items())


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)[1].unlink()
    with pytest.raises(MissingFileError, match=r"incomplete: missing model-00002-of-00002\.safetensors"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 4000])
def test_a_truncated_file_is_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"T5 text encoder in .* cannot be loaded"):
        load(folder)


def test_a_broken_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        load(folder)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds a model of type 'clip_text_model', expected 't5'"):
        load(TINY / "clip")


def test_loading_is_quiet_and_leaves_the_library_as_it_was(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"decoder.unused": torch.zeros(2)}))
    records: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    logging.getLogger("transformers").addHandler(listener)
    try:
        load(folder)
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    captured = capfd.readouterr()
    assert (records, captured.out, captured.err) == ([], "", "")


def test_fingerprint_is_of_the_numbers_not_of_their_storage(folder: Path) -> None:
    before = fingerprint([load(folder)], "a")
    assert fingerprint([load(folder, torch.bfloat16)], "a") == before
    shard(folder)
    assert fingerprint([load(folder)], "a") == before
    assert fingerprint([load(folder)], "b") != before


def test_fingerprint_sees_names_shapes_and_values() -> None:
    def layer(columns: int, rows: int, value: float = 1.0) -> nn.Module:
        module = nn.Linear(columns, rows, bias=False)
        nn.init.constant_(module.weight, value)
        return module

    clip = load_pretrained(
        CLIPTextModel, TINY / "clip", what="CLIP", model_types=("clip_text_model",), dtype=torch.float32, device="cpu"
    )
    variants: list[list[nn.Module]] = [
        [layer(6, 4)],
        [layer(4, 6)],
        [layer(6, 4, value=2.0)],
        [nn.Sequential(layer(6, 4))],
        [layer(6, 4), layer(6, 4)],
        [nn.Sequential(layer(6, 4), layer(6, 4))],
        [clip],
    ]
    assert len({fingerprint(modules) for modules in variants}) == len(variants)


def test_models_may_be_loaded_in_several_threads_at_once(folder: Path) -> None:
    verbosity = transformers_logging.get_verbosity()
    dtypes = [torch.float32, torch.bfloat16] * 8
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda dtype: load(folder, dtype), dtypes))
    assert [model.dtype for model in models] == dtypes
    assert (torch.get_default_dtype(), transformers_logging.get_verbosity()) == (torch.float32, verbosity)
