"""Fetching from the hub: what is asked for, and what is said when it is refused. No network is used."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from uso_engine.config import load_config, parse_config
from uso_engine.errors import FetchError
from uso_engine.loading.download import configured_files, download, download_tokenizers, missing_files

Call = tuple[str, str, tuple[Any, str | None]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    made: list[Call] = []

    def at(repository: str, revision: str | None) -> str:
        return repository if revision is None else f"{repository}@{revision}"

    def one_file(repository: str, name: str, *, revision: str | None, token: str | None) -> str:
        made.append(("file", at(repository, revision), (name, token)))
        return name

    def snapshot(
        repository: str, *, revision: str | None, token: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        made.append(("folder", at(repository, revision), (tuple(allow_patterns), token)))
        return repository

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return made


def test_every_part_of_the_real_model_is_asked_for(calls: list[Call]) -> None:
    said: list[str] = []
    download(load_config("uso-flux-dev"), token="secret", report=said.append)
    files = [(repository, detail[0]) for kind, repository, detail in calls if kind == "file"]
    assert ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors") in files
    assert ("bytedance-research/USO", "uso_flux_v1.0/dit_lora.safetensors") in files
    assert ("bytedance-research/USO", "uso_flux_v1.0/projector.safetensors") in files
    assert ("black-forest-labs/FLUX.1-dev", "ae.safetensors") in files
    folders = {repository: detail[0] for kind, repository, detail in calls if kind == "folder"}
    assert {"openai/clip-vit-large-patch14", "google/siglip-so400m-patch14-384"} <= set(folders)
    of_flux = [detail[0] for kind, repository, detail in calls if repository.endswith("FLUX.1-dev") and kind == "folder"]
    wanted = [pattern for patterns in of_flux for pattern in patterns]
    assert {pattern.split("/")[0] for pattern in wanted} == {"text_encoder_2", "tokenizer_2"}
    assert all(detail[1] == "secret" for _, _, detail in calls)
    assert len(said) == len(list(configured_files(load_config("uso-flux-dev"))))


def test_uno_asks_for_its_lora_and_for_no_style_encoder(calls: list[Call]) -> None:
    download(load_config("uno-flux-dev"), token=None, report=lambda line: None)
    files = [(repository, detail[0]) for kind, repository, detail in calls if kind == "file"]
    assert ("bytedance-research/UNO", "dit_lora.safetensors") in files
    assert ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors") in files
    assert not any("siglip" in repository or repository.endswith("/USO") for _, repository, _ in calls)


def test_the_embedded_model_needs_nothing(calls: list[Call]) -> None:
    download(load_config("uso-tiny"), token=None, report=lambda line: None)
    assert calls == []
    assert missing_files(load_config("uso-tiny")) == []


def test_a_path_that_looks_like_a_hub_id_is_left_alone(calls: list[Call], tmp_path: Path) -> None:
    (tmp_path / "weights" / "flux").mkdir(parents=True)
    (tmp_path / "weights" / "flux" / "a.safetensors").touch()
    table = {"name": "x", "transformer": {"checkpoint": "weights/flux/a.safetensors"}, "base_folder": tmp_path}
    loras = [
        {"path": "weights/absent.safetensors"},
        {"path": "org/name/there.safetensors"},
        {"path": "org/name@v2:b.safetensors"},
    ]
    config = parse_config({**table, "loras": loras})
    download(config, token=None, report=lambda line: None)
    assert [(repository, detail[0]) for _, repository, detail in calls] == [
        ("org/name", "there.safetensors"),
        ("org/name@v2", "b.safetensors"),
    ]


def test_what_is_missing_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = load_config("uso-flux-dev")
    assert len(missing_files(config)) == len(list(configured_files(config)))


def test_gated_models_say_where_to_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = GatedRepoError("gated", response=Mock(status_code=403))

    def refuse(*arguments: object, **options: object) -> str:
        raise refused

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        FetchError, match=r"gated\. Accept its terms at https://huggingface\.co/black-forest-labs/FLUX\.1-dev.*HF_TOKEN"
    ):
        download(load_config("uso-flux-dev"), token=None, report=lambda line: None)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FetchError, match=r"^transformer checkpoint: .* cannot be downloaded: no connection$"):
        download(load_config("uso-flux-dev"), token=None, report=lambda line: None)


def test_tokenizers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, *, token: str | None, allow_patterns: list[str]) -> None:
        asked.append((repository, allow_patterns))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    said: list[str] = []
    download_tokenizers(token=None, report=said.append)
    assert [repository for repository, _ in asked] == ["google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"]
    assert all(not pattern.endswith(("safetensors", "bin")) for _, patterns in asked for pattern in patterns)
    assert len(said) == 2
