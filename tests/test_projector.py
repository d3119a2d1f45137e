import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from uso_engine.model.projector import StyleProjector
from uso_engine.weights.recipe import draw

PATCHES, WIDTH, TOKENS, HIDDEN = 12, 20, 5, 32


def projector(dtype: torch.dtype = torch.float32) -> StyleProjector:
    module = StyleProjector(PATCHES, WIDTH, TOKENS, HIDDEN, device="meta")
    state = {key: draw(key, tuple(value.shape), "projector-test", dtype) for key, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def levels(images: int = 2) -> list[Tensor]:
    # A mean far from zero: a layer norm that forgets to centre would not be seen on centred inputs.
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(images, PATCHES, WIDTH, generator=generator) + 2.0 for _ in range(3)]


def expected_level(state: dict[str, Tensor], name: str, x: Tensor) -> npt.NDArray[np.float64]:
    """The projector's formula once more, in float64 numpy with explicit indices."""
    w = {key.removeprefix(f"{name}_"): value.double().numpy() for key, value in state.items() if key.startswith(f"{name}_")}
    mixed = np.einsum("npw,tp->ntw", x.double().numpy(), w["embedding_linear.0.weight"])
    mixed += w["embedding_linear.0.bias"][None, :, None]
    mixed = mixed / (1 + np.exp(-mixed))
    mean, variance = mixed.mean(-1, keepdims=True), mixed.var(-1, keepdims=True)
    normed = (mixed - mean) / np.sqrt(variance + 1e-5) * w["layer_norm.weight"] + w["layer_norm.bias"]
    projected: npt.NDArray[np.float64] = np.einsum("ntw,cw->ntc", normed, w["projection.weight"]) + w["projection.bias"]
    return projected


def test_matches_its_formula_in_float64() -> None:
    module = projector()
    given = levels()
    state = module.state_dict()
    expected = np.concatenate(
        [expected_level(state, name, x) for name, x in zip(("high", "mid", "low"), given, strict=True)], axis=1
    )
    got = module(given).double().numpy()
    assert got.shape == (2, 3 * TOKENS, HIDDEN)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-6


def test_parameters_are_named_as_in_the_checkpoint() -> None:
    parts = ("embedding_linear.0", "layer_norm", "projection")
    names = {f"{level}_{part}.{leaf}" for level in ("high", "mid", "low") for part in parts for leaf in ("weight", "bias")}
    shapes = {key: tuple(value.shape) for key, value in projector().state_dict().items()}
    assert set(shapes) == names
    assert shapes["mid_embedding_linear.0.weight"] == (TOKENS, PATCHES)
    assert shapes["low_layer_norm.weight"] == (WIDTH,)
    assert shapes["high_projection.weight"] == (HIDDEN, WIDTH)


def test_levels_keep_their_order() -> None:
    module = projector()
    high, mid, low = levels()
    tokens = module([high, mid, low])
    swapped = module([low, mid, high])
    assert not torch.equal(tokens[:, :TOKENS], swapped[:, :TOKENS])
    assert torch.equal(tokens[:, TOKENS : 2 * TOKENS], swapped[:, TOKENS : 2 * TOKENS])


def test_computes_in_its_own_dtype() -> None:
    tokens = projector(torch.bfloat16)(levels())
    assert tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: levels()[:2], "expected 3 levels of hidden states, got 2"),
        (lambda: [*levels()[:2], torch.zeros(2, PATCHES + 1, WIDTH)], r"\[n, 12, 20\], got low \(2, 13, 20\)"),
        (lambda: [torch.zeros(2, WIDTH)] * 3, r"high \(2, 20\), mid \(2, 20\), low \(2, 20\)"),
    ],
)
def test_refuses_other_shapes(given, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        projector()(given())
