"""Arrays, tensors and buffers as pictures, and what the message says about those that are none."""

import numpy as np
import pytest
import torch
from picture_files import encoded, gradient

from uso_engine.errors import ImageError, ImageTypeError, USOError
from uso_engine.imaging.open import ImageLimits, describe_source, open_image

PICTURE = gradient(24, 16)
BYTES = np.asarray(PICTURE)
ALPHA = np.concatenate([BYTES, np.full((16, 24, 1), 255, np.uint8)], -1)


def test_buffers() -> None:
    data = encoded(PICTURE, "PNG")
    for source in (bytearray(data), memoryview(data), memoryview(bytearray(b"x" + data))[1:]):
        assert open_image(source).tobytes() == PICTURE.tobytes()
        assert describe_source(source) == f"{len(data):,} bytes"
        with pytest.raises(ImageError, match=f"more than {len(data) - 1:,} bytes"):
            open_image(source, limits=ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize(
    "source",
    [
        BYTES,
        np.asfortranarray(BYTES),
        BYTES[:, ::-1][:, ::-1],
        ALPHA,
        BYTES / 255,
        (BYTES / 255).astype(np.float16),
        (BYTES / 255).astype(np.float32),
        torch.from_numpy(BYTES.copy()).permute(2, 0, 1),
        torch.from_numpy(BYTES.copy()).permute(2, 0, 1) / 255,
        (torch.from_numpy(BYTES.copy()).permute(2, 0, 1) / 255).double().requires_grad_(),
        torch.from_numpy(ALPHA.copy()).permute(2, 0, 1),
    ],
)
def test_arrays_and_tensors_give_the_same_pixels(source: np.ndarray | torch.Tensor) -> None:
    opened = open_image(source)
    assert opened.mode == "RGB"
    assert opened.size == (24, 16)
    assert np.array_equal(np.asarray(opened), BYTES)


def test_an_array_that_could_be_masked_and_is_not() -> None:
    assert np.array_equal(np.asarray(open_image(np.ma.masked_array(BYTES))), BYTES)


def test_numpys_own_error_state_does_not_matter() -> None:
    """Values too small for float32 are zeros."""
    with np.errstate(all="raise"):
        assert np.asarray(open_image(np.full((2, 2), 1e-300))).max() == 0


def test_grey() -> None:
    grey = BYTES[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, -1)
    for source in (grey, grey[:, :, None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(np.asarray(open_image(source)), expected)


def test_bfloat16_is_rounded_to_the_nearest_byte() -> None:
    tensor = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    assert np.asarray(open_image(tensor))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(open_image(np.array([[0.1, 0.4999]])))[0, :, 0].tolist() == [26, 127]


def test_transparency_of_arrays() -> None:
    clear = ALPHA.copy()
    clear[..., 3] = 0
    assert open_image(clear).getpixel((3, 3)) == (255, 255, 255)
    assert np.array_equal(np.asarray(open_image(clear, alpha="drop")), BYTES)


def test_the_callers_array_is_not_shared() -> None:
    mine = BYTES.copy()
    open_image(mine).putpixel((0, 0), (9, 9, 9))
    assert np.array_equal(mine, BYTES)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), r"expected the shape \[height, width\].*got \[1, 4, 4, 3\]; give the pictures of a"),
        (np.zeros((3, 8, 8), np.uint8), r"1, 3 or 4 channels last, got \[3, 8, 8\]"),
        (np.zeros((8, 8, 2), np.uint8), r"got \[8, 8, 2\]"),
        (np.zeros(8, np.uint8), r"got \[8\]"),
        (np.array(7), r"got \[\]"),
        (
            np.zeros((8, 8), np.int64),
            r"array \[8, 8\] int64\): expected values of uint8, or floats from 0 to 1, got int64",
        ),
        (np.zeros((8, 8), bool), r"got bool"),
        (np.zeros((8, 8), np.complex64), r"got complex64"),
        (np.zeros((8, 8), object), r"got object"),
        (np.full((8, 8, 3), 255.0), r"expected floats from 0 to 1, got values from 255 to 255"),
        (np.linspace(-1, 1, 64).reshape(8, 8), r"got values from -1 to 1"),
        (np.full((8, 8), np.nan), r"got values from nan to nan"),
        (np.zeros((0, 8, 3), np.uint8), r"an image of 8x0 pixels"),
        (np.zeros((8, 0)), r"an image of 0x8 pixels"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), r"9000x9000 is 81,000,000 pixels"),
        (torch.zeros(8, 8, 3), r"1, 3 or 4 channels first, got \[8, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8), r"got \[1, 3, 8, 8\]; give the pictures of a batch one by one"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), r"tensor \[3, 8, 8\] int32\): expected values of uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), r"got complex64"),
        (torch.zeros(3, 8, 8) - 1, r"got values from -1 to -1"),
        (torch.zeros(3, 8, 8, device="meta"), r"its values cannot be read; expected a dense tensor"),
        (np.full((8, 8, 3), np.float32(1.0000001)), r"expected floats from 0 to 1, got values from 1.00000012 to 1.00000012"),
        (np.full((8, 8), 1e300), r"got values from inf to inf"),
        (np.ma.masked_array(BYTES, mask=BYTES > 100), r"some of its values are masked; .*\.filled\(…\) first"),
        (torch.zeros(8, 8).to_sparse(), r"its values cannot be read; expected a dense tensor"),
    ],
)
def test_other_arrays_are_refused_by_name(source: np.ndarray | torch.Tensor, says: str) -> None:
    with pytest.raises(ImageError, match=rf"^image_urls\[0\] \(.*{says}"):
        open_image(source, name="image_urls[0]")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_has_no_shape_to_be_named_by() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)])
    with pytest.raises(ImageError, match=r"\(nested tensor float32\): its values cannot be read; expected a dense tensor"):
        open_image(nested, name="image_urls[0]")


@pytest.mark.parametrize("source", [42, None, [BYTES], {"image": BYTES}, object(), np.uint8(3)])
def test_other_types_are_refused_by_name(source: object) -> None:
    with pytest.raises(ImageTypeError, match=r"^content_images\[1\]: \w+ is not an image source; expected a path.*tensor$"):
        open_image(source, name="content_images[1]")  # type: ignore[arg-type]
    assert issubclass(ImageTypeError, USOError)
    assert issubclass(ImageTypeError, TypeError)
