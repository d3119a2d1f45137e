"""Comparing engines: metrics against known values, errors per step, and the report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uso_engine.comparison.compare import Comparison, compare
from uso_engine.comparison.image_metrics import psnr, ssim
from uso_engine.comparison.recording import Recording, record
from uso_engine.comparison.report import picture, table, write_report
from uso_engine.engine import USOEngine
from uso_engine.errors import OutputError


def noise_image(seed: int, side: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def shifted(image: Image.Image, amount: int) -> Image.Image:
    values = np.asarray(image).astype(np.int64) // 2 + 32
    return Image.fromarray((values + amount).astype(np.uint8))


def test_psnr_of_known_differences() -> None:
    image = noise_image(1)
    assert psnr(image, image) == math.inf
    assert psnr(shifted(image, 0), shifted(image, 5)) == pytest.approx(20 * math.log10(255 / 5))
    half = np.asarray(shifted(image, 0)).copy()
    half[:24] += 10
    assert psnr(shifted(image, 0), Image.fromarray(half)) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(2))
    with pytest.raises(ValueError, match="different sizes"):
        psnr(image, noise_image(1, 32))


def test_ssim_follows_its_formula() -> None:
    image = noise_image(1)
    assert ssim(image, image) == pytest.approx(1.0)
    assert ssim(image, noise_image(2)) < 0.1
    # Of two even pictures only the luminance term is left.
    dark, bright = (Image.new("RGB", (32, 32), (value,) * 3) for value in (100, 110))
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, bright) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))
    # A lower contrast: variance and covariance are known exactly.
    assert ssim(image, Image.fromarray(255 - np.asarray(image))) < -0.8
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(noise_image(1, 8), noise_image(2, 8))


def test_ssim_against_windows_computed_one_by_one() -> None:
    a, b = shifted(noise_image(3, 14), 0), shifted(noise_image(4, 14), 3)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (np.asarray(image).astype(float) @ [0.299, 0.587, 0.114] for image in (a, b))
    values = []
    for row in range(4):
        for column in range(4):
            u, v = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_u, mean_v = (window * u).sum(), (window * v).sum()
            spread_u, spread_v = (window * (u - mean_u) ** 2).sum(), (window * (v - mean_v) ** 2).sum()
            joint = (window * (u - mean_u) * (v - mean_v)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_u * mean_v + c1) * (2 * joint + c2) / ((mean_u**2 + mean_v**2 + c1) * (spread_u + spread_v + c2))
            )
    assert ssim(a, b) == pytest.approx(np.mean(values))


REQUESTS = [
    {"prompt": "a red circle", "seed": 5, "num_inference_steps": 3, "num_images": 2, "enable_safety_checker": False},
    {"prompt": "", "seed": 9, "num_inference_steps": 2, "enable_safety_checker": False},
]


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    """uso-tiny in float32, and in bf16."""
    made = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        with USOEngine.from_config("uso-tiny", device="cpu", dtype=dtype) as engine:
            made[name] = record(f"uso-tiny {name}", engine, REQUESTS)
    return made


def test_engine_is_the_same_as_itself_and_not_as_another(recordings: dict[str, Recording]) -> None:
    exact, rounded = recordings["float32"], recordings["bf16"]
    same = compare(exact, exact)
    assert [image.latent_errors for image in same.images] == [(0.0,) * 3, (0.0,) * 3, (0.0,) * 2]
    assert all(image.psnr_db == math.inf and image.ssim == pytest.approx(1) for image in same.images)
    found = compare(rounded, exact, floor=(rounded, exact))
    assert [(image.request, image.image, image.seed) for image in found.images] == [(0, 0, 5), (0, 1, 6), (1, 0, 9)]
    for image in found.images:
        assert all(0 < error < 0.1 for error in image.latent_errors)
        assert 10 < image.psnr_db < 100
    assert found.floor is not None
    assert found.floor.images == found.images


def test_latents_of_each_step_are_kept(recordings: dict[str, Recording]) -> None:
    first = recordings["float32"].requests[0]
    assert len(first.latents) == 3 and len(first.latents[0]) == 2
    assert not torch.equal(first.latents[0][0], first.latents[1][0])
    assert first.latents[0][0].dtype == torch.float32


def test_report(recordings: dict[str, Recording], tmp_path: Path) -> None:
    exact, rounded = recordings["float32"], recordings["bf16"]
    found = compare(rounded, exact, floor=(rounded, exact))
    json_path, text_path, picture_path = write_report(found, tmp_path / "new" / "folder")
    document = json.loads(json_path.read_text())
    assert document["a"] == "uso-tiny bf16"
    assert document["images"][1]["latent_errors"] == list(found.images[1].latent_errors)
    assert document["noise_floor"]["images"][2]["ssim"] == found.images[2].ssim
    text = text_path.read_text()
    assert text == table(found) + "\n"
    assert text.startswith("uso-tiny bf16 against uso-tiny float32\n")
    assert "noise floor: " in text and f"{found.images[0].psnr_db:.1f} dB" in text
    width, height = found.images[0].pictures[0].size
    with Image.open(picture_path) as image:
        assert image.size == (3 * width + 16, 3 * height + 16)
    assert json.loads(json.dumps(compare(exact, exact).document()))["images"][0]["psnr_db"] is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(found, tmp_path / "file" / "folder")


def test_picture_shows_both_and_the_amplified_difference(recordings: dict[str, Recording]) -> None:
    found = compare(recordings["bf16"], recordings["float32"])
    first = found.images[0]
    width, height = first.pictures[0].size
    one = Comparison(found.a, found.b, (first,))
    pixels = np.asarray(picture(one)).astype(int)
    a, b = (np.asarray(image).astype(int) for image in first.pictures)
    assert np.array_equal(pixels[:height, :width], a)
    assert np.array_equal(pixels[:height, width + 8 : 2 * width + 8], b)
    assert np.array_equal(pixels[:height, 2 * width + 16 :], np.clip(4 * abs(a - b), 0, 255))


def test_only_the_same_requests_can_be_compared(recordings: dict[str, Recording]) -> None:
    exact = recordings["float32"]
    fewer = Recording("fewer", exact.requests[:1])
    swapped = Recording("swapped", exact.requests[::-1])
    with pytest.raises(ValueError, match="answered 2 requests, fewer 1"):
        compare(exact, fewer)
    with pytest.raises(ValueError, match="request 0 differs"):
        compare(exact, swapped)
    with pytest.raises(ValueError, match="noise floor holds 2 images"):
        compare(exact, exact, floor=(fewer, fewer))


class _Untouchable:
    def generate(self, **fields: object) -> None:
        raise AssertionError("must not be called")


def test_requests_without_a_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one request"):
        record("x", _Untouchable(), [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a seed; missing in 1, 2"):
        record("x", _Untouchable(), [{"seed": 1}, {"prompt": "y"}, {"seed": None}])  # type: ignore[arg-type]
