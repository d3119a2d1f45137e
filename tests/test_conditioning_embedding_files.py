"""Prompt embeddings and style tokens on disk."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uso_engine.conditioning.prompt_tokenizer import Truncation, UnknownText
from uso_engine.conditioning.style import StyleTokens
from uso_engine.conditioning.text import TextEmbedding
from uso_engine.errors import CheckpointError, MissingFileError, OutputError

CUT = Truncation("T5", 32, 40, "by the séa", " and more “text”")
UNKNOWN = UnknownText("T5", "猫 “")


def embedding(width: int = 6) -> TextEmbedding:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(5, width, generator=generator).to(torch.bfloat16)
    return TextEmbedding(tokens, torch.randn(4, generator=generator), "hash", "encoder-a", (CUT,), (UNKNOWN,))


def style_tokens() -> StyleTokens:
    return StyleTokens(torch.randn(6, 8, generator=torch.Generator().manual_seed(2)), "image", "encoder-a")


def test_a_text_embedding_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = embedding()
    saved.save(tmp_path / "prompt.safetensors")
    found = TextEmbedding.load(tmp_path / "prompt.safetensors", token_width=6, pooled_width=4, encoder="encoder-a")
    assert found.tokens.dtype == torch.bfloat16
    assert torch.equal(found.tokens, saved.tokens)
    assert torch.equal(found.pooled, saved.pooled)
    assert (found.prompt_hash, found.encoder, found.truncated, found.unknown) == ("hash", "encoder-a", (CUT,), (UNKNOWN,))
    assert found.size_bytes == saved.size_bytes == 5 * 6 * 2 + 4 * 4


def test_style_tokens_come_back_as_they_were(tmp_path: Path) -> None:
    saved = style_tokens()
    saved.save(str(tmp_path / "style.safetensors"))
    found = StyleTokens.load(str(tmp_path / "style.safetensors"), width=8)
    assert torch.equal(found.tokens, saved.tokens)
    assert (found.image_hash, found.encoder) == ("image", "encoder-a")
    assert found.size_bytes == 6 * 8 * 4


@pytest.mark.parametrize(("token_width", "pooled_width"), [(7, 4), (6, 5)])
def test_an_embedding_for_another_width_is_refused(tmp_path: Path, token_width: int, pooled_width: int) -> None:
    embedding().save(tmp_path / "prompt.safetensors")
    message = rf"shapes \[5, 6\] and \[4\]; this model takes \[tokens, {token_width}\] and \[{pooled_width}\]"
    with pytest.raises(CheckpointError, match=message):
        TextEmbedding.load(tmp_path / "prompt.safetensors", token_width=token_width, pooled_width=pooled_width)


def test_style_tokens_for_another_width_are_refused(tmp_path: Path) -> None:
    style_tokens().save(tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"of shape \[6, 8\]; this model takes \[tokens, 9\]"):
        StyleTokens.load(tmp_path / "style.safetensors", width=9)


def test_other_encoders_of_the_same_width_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedding().save(tmp_path / "prompt.safetensors")
    style_tokens().save(tmp_path / "style.safetensors")
    with caplog.at_level(logging.WARNING):
        TextEmbedding.load(tmp_path / "prompt.safetensors", token_width=6, pooled_width=4, encoder="encoder-b")
        StyleTokens.load(tmp_path / "style.safetensors", width=8, encoder="encoder-b")
    assert [record.getMessage().split("was made by ")[1] for record in caplog.records] == [
        "other text encoders (encoder-a) than the ones in use (encoder-b)",
        "another style encoder (encoder-a) than the one in use (encoder-b)",
    ]


def test_one_kind_is_not_read_as_the_other(tmp_path: Path) -> None:
    style_tokens().save(tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold 'text embedding' .* but 'style tokens'"):
        TextEmbedding.load(tmp_path / "style.safetensors", token_width=6, pooled_width=4)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(6, 8)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold 'style tokens' .* but 'something else' in format 'unknown'"):
        StyleTokens.load(tmp_path / "foreign.safetensors", width=8)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    style_tokens().save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        StyleTokens.load(path, width=8)


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    StyleTokens(torch.full((6, 8), float("nan")), "image", "encoder").save(tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="not finite: tokens"):
        StyleTokens.load(tmp_path / "style.safetensors", width=8)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(5, 6)}, tmp_path / "p.safetensors", {"format": "uso-engine 1", "kind": "text embedding"})
    with pytest.raises(CheckpointError, match="missing pooled"):
        TextEmbedding.load(tmp_path / "p.safetensors", token_width=6, pooled_width=4)


@pytest.mark.parametrize("record", ["{", "[3]", '[{"encoder": "T5"}]'])
def test_an_unreadable_record_of_cuts_is_refused(tmp_path: Path, record: str) -> None:
    metadata = {"format": "uso-engine 1", "kind": "text embedding", "truncated": record}
    save_file({"tokens": torch.zeros(5, 6), "pooled": torch.zeros(4)}, tmp_path / "prompt.safetensors", metadata)
    with pytest.raises(CheckpointError, match="unreadable record of what was cut"):
        TextEmbedding.load(tmp_path / "prompt.safetensors", token_width=6, pooled_width=4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"absent\.safetensors"):
        StyleTokens.load(tmp_path / "absent.safetensors", width=8)


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot be written"):
        embedding().save(tmp_path / "file" / "prompt.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        embedding().save(tmp_path / "absent" / "prompt.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
