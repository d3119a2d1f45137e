"""Files of requests and names of results: what options mean for a batch, and names that would be written twice."""

import json
import re
from pathlib import Path
from typing import Any

import command_line
import pytest
from PIL import Image

from uso_engine import USOEngine
from uso_engine.cli.arguments import merged_line, read_batch
from uso_engine.imaging.contact_sheet import contact_sheet

SMALL = ["--size", "64x64", "--steps", "1", "--device", "cpu"]


def run(*arguments: str) -> tuple[int, str]:
    return command_line.run("generate", *arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save("content.png")
    return tmp_path


def write_lines(*lines: dict[str, object]) -> str:
    Path("lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return "lines.jsonl"


def parameters(path: str) -> dict[str, Any]:
    """What a file says that made its picture."""
    with Image.open(path) as image:
        found: dict[str, Any] = json.loads(str(image.getexif()[0x010E]))
    return found


def test_options_are_the_defaults_of_every_line(folder: Path) -> None:
    own: dict[str, object] = {
        "prompt": "b", "seed": 9, "num_images": 1, "image_urls": [], "negative_prompt": "", "guidance_scale": 2,
        "num_inference_steps": 2, "image_size": {"width": 80, "height": 64}, "style_scale": 1, "enable_safety_checker": True,
    }  # fmt: skip
    code, printed = run(
        "--batch", write_lines({"prompt": "a"}, own), *SMALL, "--seed", "5", "--num-images", "2", "--image", "content.png",
        "--negative-prompt", "blue", "--true-cfg-scale", "3", "--guidance", "7", "--style-scale", "0.5", "--no-safety-checker",
        "--parameters",
    )  # fmt: skip
    assert code == 0, printed
    assert sorted(path.name for path in folder.glob("out*")) == ["out-0001-0.png", "out-0001-1.png", "out-0002.png"]
    first, second = parameters("out-0001-1.png"), parameters("out-0002.png")
    for name, given, own_value in (
        ("seed", 6, 9),
        ("num_images", 2, 1),
        ("negative_prompt", "blue", None),
        ("true_cfg_scale", 3, None),
        ("guidance_scale", 7, 2),
        ("num_inference_steps", 1, 2),
        ("width", 64, 80),
        ("style_scale", 0.5, 1),
        ("enable_safety_checker", False, True),
    ):
        assert (first[name], second.get(name)) == (given, own_value), name
    assert (len(first["images"]["content"]), len(second["images"]["content"])) == (1, 0)


def test_what_a_line_says_by_another_field_counts_too() -> None:
    given = {"images": ["a.png"], "keep_size": True, "seed": 3}
    assert merged_line(given, {"image_urls": []}) == {"image_urls": [], "keep_size": True, "seed": 3}
    assert merged_line(given, {"image_size": "square"}) == {"images": ["a.png"], "image_size": "square", "seed": 3}


def test_a_lines_format_decides_its_ending_and_its_response(folder: Path) -> None:
    lines: tuple[dict[str, object], ...] = (
        {"prompt": "a"},
        {"prompt": "b", "output_format": "jpeg"},
        {"prompt": "c", "output_format": "png", "sync_mode": True},
    )
    code, printed = run("--batch", write_lines(*lines), *SMALL, "-o", "x.png", "--response")
    assert code == 0, printed
    written = {"x-0001.png": "PNG", "x-0002.jpg": "JPEG", "x-0003.png": "PNG"}
    for number, (name, kind) in enumerate(written.items(), 1):
        with Image.open(name) as image:
            assert image.format == kind
        body = json.loads(Path(f"x-000{number}.json").read_text(encoding="utf-8"))["images"][0]
        assert body["content_type"] == f"image/{kind.lower()}"
        assert body["url"].startswith("data:" if number == 3 else "file:")
        assert number == 3 or body["url"].endswith(name)
    code, printed = run("--batch", write_lines({"prompt": "b", "output_format": "png"}), *SMALL, "-o", "y.jpeg")
    assert (code, [path.name for path in folder.glob("y*")]) == (0, ["y-0001.png"]), printed


def test_the_format_option_gives_the_ending_and_must_not_contradict_it(folder: Path) -> None:
    for arguments, name, kind in (
        (("--format", "webp", "-o", "a"), "a.webp", "WEBP"),
        (("--format", "jpg"), "out.jpg", "JPEG"),
        (("--format", "jpeg", "-o", "b.jpg"), "b.jpg", "JPEG"),
        (("-o", "c.webp"), "c.webp", "WEBP"),
    ):
        code, printed = run("--prompt", "x", *SMALL, "--seed", "4", "--parameters", "--response", *arguments)
        assert code == 0, printed
        with Image.open(name) as image:
            assert image.format == kind
        assert parameters(name)["seed"] == 4
        body = json.loads(Path(name).with_suffix(".json").read_text(encoding="utf-8"))["images"][0]
        assert body["content_type"] == f"image/{kind.lower()}"
    code, printed = run(
        "--batch", write_lines({"prompt": "a"}, {"prompt": "b", "output_format": "png"}), *SMALL, "--format", "webp"
    )
    assert (code, sorted(path.name for path in folder.glob("out-*"))) == (0, ["out-0001.webp", "out-0002.png"]), printed
    for arguments, says in (
        (("--format", "webp", "-o", "a.png"), "--format webp contradicts the name a.png, which ends in .png; give one of them"),
        (("--format", "gif"), "--format takes png, jpg, jpeg or webp, got 'gif'"),
        (("--format", "jpg", "-o", "a.gif"), "a.gif: expected a name that ends in .png, .jpg, .jpeg or .webp"),
    ):
        assert run("--prompt", "x", *arguments) == (2, f"error: {says}")


def test_a_sheet_does_not_take_the_place_of_a_picture(folder: Path) -> None:
    before = Path("content.png").read_bytes()
    for name in ("content.png", f"file:{folder}/content.png", str(folder / "content.png")):
        code, printed = run("--prompt", "x", "--image", name, "-o", "a.png", "--contact-sheet", "./content.png")
        shown = name.removeprefix("file:")
        said = f"error: --contact-sheet content.png would overwrite the picture {shown}; name another file"
        assert (code, printed) == (2, said)
    Image.new("RGB", (8, 8)).save("s-0002.png")
    batch = write_lines({"prompt": "a", "image_urls": ["s-0002.png"]}, {"prompt": "b"})
    code, printed = run("--batch", batch, "--contact-sheet", "s.png")
    assert (code, "--contact-sheet s-0002.png would overwrite the picture s-0002.png" in printed) == (2, True), printed
    assert Path("content.png").read_bytes() == before


def test_a_seed_of_minus_one_is_drawn_in_a_line_too(folder: Path) -> None:
    """Whatever the option says, however JSON writes the number; in a comparison it is a seed that is missing."""
    batch = write_lines(
        {"prompt": "a", "seed": -1}, {"prompt": "a", "seed": -1.0}, {"prompt": "a"}, {"prompt": "a", "seed": -2}
    )
    code, printed = run("--batch", batch, "--seed", "5", *SMALL, "-o", "a.png", "--parameters")
    assert code == 1, printed
    assert "request 4: seed must be a whole number from 0 to 18446744073709551615, got -2" in printed
    first, second, third = (parameters(f"a-000{number}.png")["seed"] for number in (1, 2, 3))
    assert third == 5
    assert first != second
    assert {first, second}.isdisjoint({5, -1})
    code, printed = command_line.run("compare", "uso-tiny", "uso-tiny", "--requests", batch, "--no-floor", "--device", "cpu")
    assert (code, "every compared request needs a seed; missing in 0, 1, 2" in printed) == (2, True), printed


def test_a_seed_of_minus_one_is_drawn_and_printed(folder: Path) -> None:
    seeds = []
    for name in ("a.png", "b.png"):
        code, printed = run("--prompt", "x", "--seed", "-1", *SMALL, "-o", name, "--parameters")
        assert code == 0, printed
        (seed,) = re.findall(r"seed (\d+),", printed)
        assert parameters(name)["seed"] == int(seed) >= 1
        seeds.append(seed)
    assert seeds[0] != seeds[1]
    code, printed = run("--prompt", "x", "--seed", seeds[0], *SMALL, "-o", "again.png")
    assert code == 0, printed
    with Image.open("a.png") as first, Image.open("again.png") as again:
        assert first.tobytes() == again.tobytes()
    code, printed = run("--prompt", "x", "--seed", "-2", *SMALL)
    assert (code, "seed" in printed) == (2, True), printed


def test_lines_end_where_a_line_feed_is(tmp_path: Path) -> None:
    prompts = ["a\u2028b", "c\x85d", "e\x0cf"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_batch(path) == [{"prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize("output", ["x", "x.txt"])
def test_a_name_without_a_pictures_ending_is_refused_whatever_a_line_asks_for(output: str, folder: Path) -> None:
    code, printed = run("--batch", write_lines({"prompt": "a", "output_format": "jpeg"}), *SMALL, "-o", output)
    assert (code, printed) == (2, f"error: {output}: expected a name that ends in .png, .jpg, .jpeg or .webp")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--prompt", "x", "-o", "x.png", "--contact-sheet", "x.png"), "x.png"),
        (("--prompt", "x", "-o", "x.png", "--contact-sheet", "sub/../x.png"), "x.png"),
        (("--prompt", "x", "-o", "x.png", "--contact-sheet", "x-1.png", "--num-images", "2"), "x-1.png"),
        (("--batch", "lines.jsonl", "-o", "x.png", "--contact-sheet", "x.png"), "x-0001.png"),
        (("--batch", "x-0001.json", "-o", "x.png", "--response"), "x-0001.json"),
        (("--batch", "two.jsonl", "-o", "x.png", "--contact-sheet", "x-0001-0.png"), None),
    ],
)
def test_names_that_would_be_written_twice_are_refused(arguments: tuple[str, ...], name: str | None, folder: Path) -> None:
    Path("sub").mkdir()
    line = json.dumps({"prompt": "a", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1})
    for file in ("lines.jsonl", "x-0001.json", "two.jsonl"):
        Path(file).write_text(line, encoding="utf-8")
    before = sorted(folder.iterdir())
    code, printed = run(*arguments, "--device", "cpu")
    if name is None:
        assert code == 0, printed
        return
    assert (code, "more than one file would be named" in printed, name in printed) == (2, True, True), printed
    assert sorted(folder.iterdir()) == before


def test_a_sheet_shows_the_content_and_not_the_result_that_took_its_place(folder: Path) -> None:
    with Image.open("content.png") as image:
        content = image.convert("RGB")
    code, printed = run(
        "--prompt", "x", "--image", "content.png", "-o", "content.png", "--contact-sheet", "sheet.png", "--seed", "3", *SMALL
    )
    assert code == 0, printed
    with Image.open("content.png") as result, Image.open("sheet.png") as sheet:
        expected = contact_sheet([("content", content)], [("seed 3", result.convert("RGB"))], title="x")
        assert sheet.convert("RGB").tobytes() == expected.tobytes()


def test_requests_are_checked_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(USOEngine, "from_config", load)
    code, printed = run("--prompt", "x", "--steps", "77")
    assert (code, "num_inference_steps must be" in printed) == (2, True), printed
    code, printed = run("--prompt", "x", "--size", "64x64", "--keep-size")
    assert (code, "--size or --keep-size" in printed) == (2, True), printed
    Path("broken.png").write_bytes(Path("content.png").read_bytes()[:-40])
    for command in ("generate", "profile"):
        for images, says in (
            (["none", "no-such.png"], "image_urls[1] ('no-such.png'): no such file"),
            (["broken.png"], "image_urls[0] ('broken.png')"),
        ):
            code, printed = command_line.run(command, "--prompt", "x", *(part for name in images for part in ("--image", name)))
            assert (code, says in printed) == (1, True), printed
    code, printed = run("--prompt", "x", "--lora", "no-such.safetensors")
    assert (code, "no-such.safetensors was not found" in printed) == (1, True), printed
    Path("folder.json").mkdir()
    code, printed = run("--prompt", "x", "-o", "folder.png", "--response")
    assert (code, "it is a folder" in printed) == (1, True), printed
