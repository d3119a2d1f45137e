"""`uso-engine verify` on cases of our own, and that it finds what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uso_engine.errors import BackendError, CheckpointError, MissingFileError
from uso_engine.verification.measure import Check, bound_for, relative_error
from uso_engine.verification.run import VerifyOptions, verify


@pytest.fixture
def cases(repository: Path) -> Path:
    return repository / "tests" / "reference"


def run(folder: Path, **options: str) -> list[Check]:
    return list(verify(folder, VerifyOptions(**options)))  # type: ignore[arg-type]


def alone(folder: Path, name: str, tmp_path: Path) -> Path:
    shutil.copy(folder / f"{name}.safetensors", tmp_path)
    return tmp_path / f"{name}.safetensors"


def test_every_case_of_ours_is_within_its_bound(cases: Path) -> None:
    checks = run(cases)
    assert [check for check in checks if not check.is_within] == []
    # Nothing is passed over: every file, and every kind of tensor.
    assert {check.case for check in checks} == {path.stem for path in cases.glob("*.safetensors")}
    names = {check.name for check in checks if check.case == "padded_content_and_style"}
    assert names >= {
        "timesteps", "img_ids", "ref_ids.0", "noise", "style_tokens.0", "double.0.img", "double.1.txt", "single.0", "single.2",
        "velocity.0", "latents.0", "latents.2", "unpacked",
    }  # fmt: skip
    bounded = [check for check in checks if check.case != "bfloat16_padded"]
    assert all(check.bound is not None for check in bounded)


def test_bf16_tier_is_within_its_bounds(cases: Path, tmp_path: Path) -> None:
    alone(cases, "three_contents", tmp_path)
    checks = run(tmp_path, tier="bf16")
    assert [check for check in checks if not check.is_within] == []
    velocity = next(check for check in checks if check.name == "velocity.0")
    # Really computed in bfloat16: far over what float32 makes.
    assert 1e-3 < velocity.error < 0.015


@pytest.mark.parametrize("name", ["velocity.0", "latents", "double.0.txt", "style_tokens.0", "noise", "ref_ids.0", "timesteps"])
def test_a_wrong_reference_is_found(cases: Path, tmp_path: Path, name: str) -> None:
    path = alone(cases, "padded_content_and_style", tmp_path)
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    tensors[name] = tensors[name] * (1 + 2e-5)
    save_file(tensors, path, metadata=metadata)
    wrong = {check.name for check in run(tmp_path) if not check.is_within}
    assert wrong
    assert all(entry.startswith(name) for entry in wrong)


def test_another_salt_is_another_model(cases: Path, tmp_path: Path) -> None:
    path = alone(cases, "offset_rows_only", tmp_path)
    with safe_open(path, "pt") as stream:
        settings = json.loads(stream.metadata()["case"])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"case": json.dumps({**settings, "salt": "other"})})
    assert any(check.name == "velocity.0" and check.error > 0.1 for check in run(tmp_path))


def test_tables_are_checked(tmp_path: Path) -> None:
    tables = {
        "schedule": {"4@1024x1024": [1.0, 0.8272286653518677, 0.6147918701171875, 0.34725838899612427, 0.0]},
        "preprocess_ref": {
            "100x100": {
                "image_seed": 4, "size": [512, 512], "keep_size": [1024, 1024],
                "mean": [123.18897247314453, 127.36994552612305, 126.58496856689453],
                "corner": [126, 183, 78], "centre": [235, 131, 151], "crc32": 3408648532,
            }
        },
    }  # fmt: skip
    (tmp_path / "tables.json").write_text(json.dumps(tables), encoding="utf-8")
    assert all(check.is_within for check in run(tmp_path))
    tables["schedule"]["4@1024x1024"][1] = 0.83  # type: ignore[index]
    tables["preprocess_ref"]["100x100"]["keep_size"] = [1024, 1008]  # type: ignore[index]
    (tmp_path / "tables.json").write_text(json.dumps(tables), encoding="utf-8")
    assert {check.name for check in run(tmp_path) if not check.is_within} == {
        "schedule 4@1024x1024",
        "preprocess_ref 100x100 size",
    }


def test_what_is_no_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="holds no reference cases"):
        run(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="metadata has no 'case'"):
        run(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"case": '{"width": 3}'})
    with pytest.raises(CheckpointError, match="settings cannot be read"):
        run(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        run(tmp_path)


def test_not_a_number_and_wrong_shapes_are_never_within() -> None:
    truth = torch.ones(3)
    assert relative_error(torch.ones(4), truth) == float("inf")
    assert not Check("c", "t", relative_error(torch.full((3,), float("nan")), truth), 0.5).is_within
    assert relative_error(torch.ones(3) * 1.01, truth) == pytest.approx(0.01, rel=1e-3)


def test_bounds_are_those_of_the_references() -> None:
    assert bound_for("single.1", "float32", 3) == 5e-6
    assert (bound_for("velocity.0", "fp8", 3), bound_for("latents.3", "fp8", 3)) == (0.045, 0.03)
    assert (bound_for("velocity.0", "int4", 3), bound_for("unpacked", "int4", 3)) == (0.16, 0.11)
    assert bound_for("latents.2", "int8", 3) is None
    assert bound_for("noise", "bf16", 3) == 5e-6


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_every_attention_that_runs_on_a_cpu_is_within_bounds(cases: Path, tmp_path: Path, attention: str) -> None:
    alone(cases, "three_contents", tmp_path)
    assert [check for check in run(tmp_path, attention=attention, tier="float32") if not check.is_within] == []


@pytest.mark.parametrize("case", ["offset_rows_only", "autoencoder_two_levels"])
def test_attention_that_cannot_run_is_an_error(case: str, cases: Path, tmp_path: Path) -> None:
    """Before anything is compared, even where nothing attends."""
    alone(cases, case, tmp_path)
    with pytest.raises(BackendError, match="'flash' cannot run on cpu: there is no such backend; these can: auto, dense"):
        run(tmp_path, attention="flash")
