"""The command line as a person types it, mistakes included."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from PIL import Image

import uso_engine
from uso_engine.config import list_configs

FAST = ["--size", "64x64", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(folder / "content.png")
    Image.radial_gradient("L").convert("RGB").save(folder / "style.jpg")
    return str(folder / "content.png"), str(folder / "style.jpg")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from uso_engine.cli import main; sys.argv = ['uso-engine', 'generate', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_version_is_the_packages() -> None:
    assert run("--version") == (0, f"uso-engine {uso_engine.__version__}")


def test_generate_writes_images_sheet_and_response(pictures: tuple[str, str], tmp_path: Path) -> None:
    output, sheet = tmp_path / "house.png", tmp_path / "sheet.png"
    code, printed = run(
        "generate", "--prompt", "a house", "--image", pictures[0], "--image", pictures[1], "--num-images", "2", "--seed", "7",
        "-o", str(output), "--contact-sheet", str(sheet), "--response", "--parameters", *FAST,
    )  # fmt: skip
    assert code == 0, printed
    assert "demonstration model" in printed
    names = ["house-0.png", "house-1.png"]
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)
            assert str(image.getexif()[0x0131]).startswith("AI generated;")
    with Image.open(sheet) as image:
        assert image.width > 600
    body = json.loads((tmp_path / "house.json").read_text(encoding="utf-8"))
    assert body["seed"] == 7
    assert [Path(entry["url"]).name for entry in body["images"]] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "house.json", "sheet.png"])


def test_the_same_seed_writes_the_same_picture(pictures: tuple[str, str], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        code, printed = run(
            "generate", "--prompt", "x", "--image", pictures[0], "--seed", "3", "-o", str(tmp_path / name), *FAST
        )
        assert code == 0, printed
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_style_alone(pictures: tuple[str, str], tmp_path: Path) -> None:
    code, printed = run(
        "generate", "--prompt", "x", "--image", "none", "--image", pictures[1], "-o", str(tmp_path / "a.jpg"), *FAST
    )
    assert code == 0, printed
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG"


def test_batch_keeps_what_was_finished(pictures: tuple[str, str], tmp_path: Path) -> None:
    small = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1, "seed": 1}
    lines = [
        {"prompt": "a", **small},
        {"prompt": "b", **small, "guidance_scale": 99},
        {"prompt": "c", "images": [pictures[0]], **small},
    ]
    batch = tmp_path / "requests.jsonl"
    batch.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    code, printed = run("generate", "--batch", str(batch), "-o", str(tmp_path / "out.png"), "--device", "cpu")
    assert code == 1
    assert "request 2:" in printed
    assert "guidance_scale" in printed.split("request 2:")[1]
    assert "type=" not in printed
    assert "1 of 3 requests failed" in printed
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-0001.png", "out-0003.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "either --prompt or --batch"),
        (("--prompt", "x", "--batch", "b.jsonl"), 2, "either --prompt or --batch"),
        (("--prompt", "x", "-o", "picture.gif"), 2, "ends in .png, .jpg, .jpeg or .webp"),
        (("--prompt", "x", "-o", "no-such-folder/a.png"), 1, "there is no folder no-such-folder"),
        (("--prompt", "x", "--image", "no-such.png"), 1, "no-such.png"),
        (("--prompt", "x", "--image", ""), 2, "--image is empty; give a path or URL, or 'none'"),
        (("--prompt", "x", "--size", "64x100000"), 2, "image_size.height must be from 64 to 1024, got 100000"),
        (("--prompt", "x", "--size", "hugge"), 2, "image_size"),
        (("--prompt", "x", "--steps", "0"), 2, "num_inference_steps"),
        (("--prompt", "x", "--lora", "a=b=heavy"), 2, "'heavy' is not a number"),
        (("--prompt", "x", "--lora", "no-such.safetensors"), 1, "no-such.safetensors"),
        (("--prompt", "x", "--config", "uso-tinny"), 1, "did you mean 'uso-tiny'"),
        (("--prompt", "x", "--config", "uso-flux-dev"), 1, "uso-engine download"),
        (("--prompt", "x", "--device", "cuda:77"), 1, "cuda:77"),
        (("--prompt", "x", "--memory-budget", "0.5"), 1, "uso-tiny does not fit into 0.5 GiB"),
        (("--prompt", "x", "--memory-budget", "-1"), 2, "memory_budget_gib must be a number of GiB"),
        (("--batch", "no-such.jsonl"), 1, "no file of requests"),
        (("--prompt", "x", "--device", "meta"), 1, "the engine runs on 'cpu', 'cuda'"),
        (("--wrong-flag",), 2, "No such option"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    got, printed = run("generate", *arguments)
    assert got == code, printed
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_broken_batch_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    for content, message in (
        ("{}\n{", "line 2: not JSON"),
        ("[1]", "line 1: expected a JSON object, got list"),
        ("\n", "no requests"),
        ('{"prompt": "a"}\n' + "[" * 100_000, "line 2: cannot be read: maximum recursion depth"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1: cannot be read: Exceeds the limit"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 1: cannot be read: 'seed' is given more than once"),
        (b"{}\xff", f"{path.name} is not UTF-8 text: invalid start byte at byte 2"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        code, printed = run("generate", "--batch", str(path))
        assert code == 2
        assert message in " ".join(printed.split())
    code, printed = run("generate", "--batch", str(tmp_path))
    assert (code, f"{tmp_path.name} cannot be read: Is a directory" in printed) == (2, True), printed


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "from uso_engine.cli import main; main()", "generate", "--prompt", "x", "--steps", "50",
        "--size", "1024x1024", "--device", "cpu", "-o", "picture.png",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run that was itself started in the background would hand on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Loading takes seconds and 50 steps of 1024x1024 much longer: this falls into one or the other.
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_config_list_and_show() -> None:
    code, printed = run("config", "list")
    assert code == 0
    assert all(name in printed for name in list_configs())
    code, printed = run("config", "show", "uso-tiny")
    assert code == 0
    assert json.loads(printed)["transformer"]["params"]["guidance_embed"] is True


def test_info_says_what_there_is() -> None:
    code, printed = run("info")
    assert code == 0, printed
    for word in ("torch", "triton", "device", "kernels", "attention chunked", "FLUX.1-dev in int4"):
        assert word in printed


def test_info_refuses_what_nobody_has() -> None:
    for arguments in (("--budget", "nan"), ("--budget", "inf"), ("--budget", "1e-9"), ("--num-images", "0"), ("--width", "0")):
        code, printed = run("info", "uso-flux-dev-int4", *arguments)
        assert (code, arguments[0] in printed, "Traceback" in printed) == (2, True, False), printed


def test_evaluate_looks_at_its_output_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        code, printed = run("evaluate", "--count", "2", "--output", str(output))
        assert (code, "cannot write to" in printed, "Traceback" in printed, "everything given" in printed) == (
            1,
            True,
            False,
            False,
        )


def test_verify_needs_cases(tmp_path: Path) -> None:
    code, printed = run("verify", str(tmp_path))
    assert code == 1
    assert "holds no reference cases" in printed
    code, printed = run("verify", str(tmp_path / "nowhere"))
    assert code == 1
    assert "no folder" in printed


def test_verify_runs_the_triton_kernels_under_their_interpreter(repository: Path, tmp_path: Path) -> None:
    """With each attention, in one process: both begin by importing torch."""
    shutil.copy(repository / "tests" / "reference" / "offset_rows_only.safetensors", tmp_path)
    arguments = ["verify", str(tmp_path), "--kernels", "triton", "--attention"]
    code = f"""
import sys
from uso_engine.cli import main
for attention in ("triton", "dense"):
    sys.argv = ["uso-engine", *{arguments!r}, attention]
    try:
        main()
    except SystemExit as ending:
        assert not ending.code, attention
"""
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 over their bound") == 2
