import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch
from small_encoders import TINY, copied, edit_json, edit_weights, fill
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from uso_engine.conditioning.prompt_tokenizer import PromptTokenizer
from uso_engine.conditioning.text import TextEncoders
from uso_engine.embedded.corpus import captions
from uso_engine.errors import CheckpointError, MissingFileError, PromptError
from uso_engine.verification.measure import relative_error

PROMPT = "A red mushroom on the beach, watercolor style."
LONG = "a small house by the sea, " * 30


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return TextEncoders.from_folders(TINY / "t5", TINY / "clip", t5_max_length=32, dtype=torch.float32)


@pytest.fixture
def t5_folder(tmp_path: Path) -> Path:
    return copied("t5", tmp_path)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return copied("clip", tmp_path)


def test_t5_sees_the_padding_and_no_mask(encoders: TextEncoders) -> None:
    model = T5EncoderModel.from_pretrained(TINY / "t5", dtype=torch.float32)
    tokenizer = T5Tokenizer.from_pretrained(TINY / "t5")
    ids = tokenizer(PROMPT)["input_ids"]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (32 - len(ids))])
    with torch.no_grad():
        expected = model(input_ids=padded).last_hidden_state[0]
        masked = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[0]
    tokens = encoders.encode(PROMPT).tokens
    assert tokens.shape == (32, 64)
    assert torch.equal(tokens, expected)
    assert not torch.allclose(tokens, masked, atol=1e-3)


def test_clip_pools_at_the_first_end_of_text(encoders: TextEncoders) -> None:
    model = CLIPTextModel.from_pretrained(TINY / "clip", dtype=torch.float32)
    ids = CLIPTokenizer.from_pretrained(TINY / "clip")(PROMPT)["input_ids"]
    end = ids[-1]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids + [end] * (77 - len(ids))])).last_hidden_state[0]
    pooled = encoders.encode(PROMPT).pooled
    assert pooled.shape == (64,)
    assert torch.allclose(pooled, states[len(ids) - 1], atol=1e-6)
    assert not torch.allclose(pooled, states[-1], atol=1e-3)


def test_the_empty_prompt_is_legal(encoders: TextEncoders) -> None:
    empty = encoders.encode("")
    assert empty.truncated == ()
    assert bool(torch.isfinite(empty.tokens).all() and torch.isfinite(empty.pooled).all())
    assert not torch.equal(empty.tokens, encoders.encode("a").tokens)


@pytest.mark.parametrize("prompt", [None, b"bytes", 3, ["a"]])
def test_refuses_what_is_not_text(encoders: TextEncoders, prompt: str) -> None:
    with pytest.raises(ValueError, match=f"must be a string, got {type(prompt).__name__}"):
        encoders.encode(prompt)


def test_refuses_half_a_surrogate_pair(encoders: TextEncoders) -> None:
    with pytest.raises(PromptError, match="not valid Unicode: half a surrogate pair at character 2"):
        encoders.encode("ok\ud83d")


def test_says_where_each_encoder_cut(encoders: TextEncoders) -> None:
    found = encoders.encode(LONG)
    t5, clip = found.truncated
    assert (t5.encoder, t5.limit, clip.encoder, clip.limit) == ("T5", 32, "CLIP", 77)
    assert t5.length > 200
    for cut in (t5, clip):
        read = LONG[: len(LONG) - len(cut.lost)]
        assert read + cut.lost == LONG
        assert read.endswith(cut.cut_after)
        assert len(cut.cut_after) == 40
    # 31 pieces and the end: four repetitions of "a small house by the sea," are 28.
    assert t5.cut_after.endswith("by the sea, a small house")
    assert len(clip.lost) < len(t5.lost)
    first, second = found.warnings("the negative prompt")
    assert first.startswith("T5 takes 32 tokens, the negative prompt has ")
    assert first.endswith(f"for T5 cut after '…{t5.cut_after}'; CLIP read further, to a limit of its own")
    assert second.startswith("CLIP takes 77 tokens, the negative prompt has ")
    assert second.endswith(f"for CLIP cut after '…{clip.cut_after}'; no encoder read what follows")


def test_only_the_encoder_that_cut_says_so(encoders: TextEncoders) -> None:
    found = encoders.encode("a small house by the sea, " * 5)
    assert [cut.encoder for cut in found.truncated] == ["T5"]
    (warning,) = found.warnings()
    assert warning.startswith("T5 takes 32 tokens, the prompt has 36: for T5 cut after '…")
    assert warning.endswith("'; CLIP read all of it")


def test_what_t5_has_no_token_for_is_named_once(encoders: TextEncoders) -> None:
    found = encoders.encode("a 猫 by the 椅子, a 猫")
    assert [(entry.encoder, entry.text) for entry in found.unknown] == [("T5", "猫 椅子")]
    assert encoders.encode("Ein Haus, a house!").unknown == ()


@pytest.mark.parametrize(("words", "cut"), [(31, False), (32, True)])
def test_a_prompt_that_just_fits_is_not_cut(encoders: TextEncoders, words: int, cut: bool) -> None:
    assert bool(encoders.encode("tree " * words).truncated) == cut


def test_a_prompt_does_not_depend_on_earlier_ones(encoders: TextEncoders) -> None:
    alone = encoders.encode(PROMPT)
    encoders.encode(LONG)
    again = encoders.encode(PROMPT)
    assert torch.equal(alone.tokens, again.tokens)
    assert torch.equal(alone.pooled, again.pooled)
    assert alone.prompt_hash == again.prompt_hash == encoders.hash_prompt(PROMPT)


def test_threads_share_the_encoders(encoders: TextEncoders) -> None:
    prompts = [f"a {word} " * (3 + index * 7) for index, word in enumerate(("tree", "boat", "cat", "dog"))]
    expected = {prompt: encoders.encode(prompt).tokens for prompt in prompts}
    wrong: list[str] = []

    def work(prompt: str) -> None:
        for _ in range(10):
            if not torch.equal(encoders.encode(prompt).tokens, expected[prompt]):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_runs_in_bfloat16_under_the_same_identity(encoders: TextEncoders) -> None:
    half = TextEncoders.from_folders(TINY / "t5", TINY / "clip", t5_max_length=32, dtype=torch.bfloat16)
    found = half.encode(PROMPT)
    assert found.tokens.dtype == found.pooled.dtype == torch.bfloat16
    full = encoders.encode(PROMPT)
    assert relative_error(found.tokens, full.tokens) < 0.02
    assert half.identity == encoders.identity


def test_identity_depends_on_weights_tokenizer_and_length(encoders: TextEncoders, t5_folder: Path, clip_folder: Path) -> None:
    shorter = TextEncoders.from_folders(TINY / "t5", TINY / "clip", t5_max_length=16, dtype=torch.float32)
    edit_weights(t5_folder, lambda tensors: tensors["shared.weight"].mul_(2))
    other_weights = TextEncoders.from_folders(t5_folder, TINY / "clip", t5_max_length=32, dtype=torch.float32)
    content = json.loads((clip_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (clip_folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other_words = TextEncoders.from_folders(TINY / "t5", clip_folder, t5_max_length=32, dtype=torch.float32)
    assert len({x.identity for x in (encoders, shorter, other_weights, other_words)}) == 4


def test_a_tokenizer_that_was_used_is_still_the_same_tokenizer() -> None:
    tokenizer = T5Tokenizer.from_pretrained(TINY / "t5")
    fresh = PromptTokenizer("T5", tokenizer, 32, 2000)
    fresh.tokenize(LONG)
    assert PromptTokenizer("T5", tokenizer, 32, 2000).definition == fresh.definition


def test_loads_the_text_half_of_a_whole_clip(encoders: TextEncoders, tmp_path: Path, clip_folder: Path) -> None:
    text = json.loads((clip_folder / "config.json").read_text(encoding="utf-8"))
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=64))
    fill(whole, "whole clip")
    whole.train(False)
    whole.save_pretrained(tmp_path / "whole")
    # As openai/clip-vit-large-patch14 still has them.
    ids = {f"{tower}.embeddings.position_ids": torch.arange(5)[None] for tower in ("text_model", "vision_model")}
    edit_weights(tmp_path / "whole", lambda tensors: tensors.update(ids))
    both = TextEncoders.from_folders(
        TINY / "t5", tmp_path / "whole", clip_tokenizer=clip_folder, t5_max_length=32, dtype=torch.float32
    )
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = whole.text_model(input_ids=tokens["input_ids"]).pooler_output[0]
    assert torch.allclose(both.encode(PROMPT).pooled, expected, atol=1e-6)
    assert both.identity != encoders.identity


def test_reads_a_tokenizer_that_is_only_a_sentencepiece_model(tmp_path: Path) -> None:
    """google/t5-v1_1-xxl ships nothing else."""
    texts: Iterator[str] = captions(3000)
    with (tmp_path / "spiece.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=stream, vocab_size=500, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            minloglevel=2, num_threads=1,
        )  # fmt: skip
    encoders = TextEncoders.from_folders(
        TINY / "t5", TINY / "clip", t5_tokenizer=tmp_path, t5_max_length=32, dtype=torch.float32
    )
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model")).encode(PROMPT)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    assert tokenizer(PROMPT)["input_ids"] == [*expected, 1]
    assert encoders.encode(PROMPT).truncated == ()


@pytest.mark.parametrize(
    ("part", "file", "message"),
    [
        ("t5", "config.json", "T5 text encoder configuration in .*t5 is incomplete: needs config.json"),
        ("t5", "model.safetensors", "T5 text encoder weights in .*t5 is incomplete: needs model.safetensors or"),
        ("t5", "tokenizer.json", "T5 tokenizer in .*t5 is incomplete: needs tokenizer.json or spiece.model"),
        ("clip", "config.json", "CLIP text encoder configuration in"),
        ("clip", "model.safetensors", "CLIP text encoder weights in"),
        ("clip", "tokenizer.json", "CLIP tokenizer in .* needs tokenizer.json or vocab.json and merges.txt"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, part: str, file: str, message: str) -> None:
    folders = {name: copied(name, tmp_path) for name in ("t5", "clip")}
    (folders[part] / file).unlink()
    with pytest.raises(MissingFileError, match=message):
        TextEncoders.from_folders(folders["t5"], folders["clip"], t5_max_length=32)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"T5 tokenizer not found: no folder .*absent"):
        TextEncoders.from_folders(tmp_path / "absent", TINY / "clip", t5_max_length=32)


def test_a_tokenizer_without_words_is_refused(t5_folder: Path) -> None:
    content = json.loads((t5_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] = [*content["model"]["vocab"][:3], ["▁", -2.0]]
    (t5_folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="T5's tokenizer does not know plain English words"):
        TextEncoders.from_folders(t5_folder, TINY / "clip", t5_max_length=32)


def test_a_tokenizer_of_another_model_is_refused(t5_folder: Path) -> None:
    content = json.loads((t5_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"].append(["▁another", -9.0])
    (t5_folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"T5's tokenizer has ids up to (\d+), its encoder only \1 embeddings"):
        TextEncoders.from_folders(t5_folder, TINY / "clip", t5_max_length=32)


def test_a_tokenizer_file_of_another_kind_is_refused(clip_folder: Path) -> None:
    (clip_folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        TextEncoders.from_folders(TINY / "t5", clip_folder, t5_max_length=32)


def test_clip_that_would_pool_at_the_wrong_token_is_refused(clip_folder: Path) -> None:
    edit_json(clip_folder / "config.json", eos_token_id=7)
    with pytest.raises(CheckpointError, match="end-of-text id 7, its tokenizer 1013"):
        TextEncoders.from_folders(TINY / "t5", clip_folder, t5_max_length=32)


@pytest.mark.parametrize(("t5", "clip", "wrong"), [(1, 77, "t5"), (32, 78, "clip"), (32, 2, "clip")])
def test_refuses_lengths_that_an_encoder_cannot_take(t5: int, clip: int, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}_max_length must be .* got {t5 if wrong == 't5' else clip}"):
        TextEncoders.from_folders(TINY / "t5", TINY / "clip", t5_max_length=t5, clip_max_length=clip)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("a “quoted” word and the artist’s house", 'a "quoted" word and the artist\'s house'),
        ("ａ ｈｏｕｓｅ", "a house"),
        ("a ﬁne ﬂower", "a fine flower"),
        ("a cafÃ© by the sea", "a café by the sea"),
        ("a &lt;house&gt; by the sea", "a <house> by the sea"),
    ],
)
def test_clip_reads_prompts_cleaned_and_t5_as_they_are(written: str, plain: str, encoders: TextEncoders) -> None:
    one, other = encoders.encode(written), encoders.encode(plain)
    assert torch.equal(one.pooled, other.pooled)
    tokenizer = T5Tokenizer.from_pretrained(TINY / "t5")
    ids = tokenizer(written, padding="max_length", max_length=32, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = encoders.t5(input_ids=ids).last_hidden_state[0]
    assert torch.equal(one.tokens, expected)


def test_a_cut_is_told_of_the_text_as_clip_reads_it(encoders: TextEncoders) -> None:
    (cut,) = (cut for cut in encoders.encode("“ﬁne” " * 60).truncated if cut.encoder == "CLIP")
    assert cut.cut_after.endswith('"') or "fine" in cut.cut_after
    assert '"fine"' in cut.lost
