"""Noise and the two shapes of a latent."""

import pytest
import torch

from uso_engine.sampling.latents import draw_noise, pack_latent, token_grid, unpack_latent
from uso_engine.sampling.noise import draw_normal


def test_packing_puts_channels_before_the_patch() -> None:
    latent = torch.arange(16 * 4 * 6, dtype=torch.float32).view(16, 4, 6)
    tokens = pack_latent(latent)
    assert tokens.shape == (6, 64)
    # Token 4 is the second row, second column of patches; its columns are channel, then patch row, then patch column.
    assert torch.equal(tokens[4], latent[:, 2:4, 2:4].reshape(-1))
    assert torch.equal(unpack_latent(tokens, (2, 3)), latent)


def test_packing_keeps_leading_axes() -> None:
    latents = torch.randn(3, 16, 2, 8)
    assert torch.equal(pack_latent(latents)[1], pack_latent(latents[1]))
    assert torch.equal(unpack_latent(pack_latent(latents), (1, 4)), latents)


def test_shapes_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="even height and width"):
        pack_latent(torch.zeros(16, 3, 4))
    with pytest.raises(ValueError, match="2x3 has 6 tokens, got 5"):
        unpack_latent(torch.zeros(5, 64), (2, 3))
    with pytest.raises(ValueError, match="multiples of 16, got 100x64"):
        token_grid(100, 64)
    with pytest.raises(ValueError, match="multiples of 16, got 0x64"):
        token_grid(0, 64)


def test_a_seed_means_the_same_noise_in_every_precision() -> None:
    noise = draw_noise(48, 32, 7)
    assert noise.shape == (16, 4, 6)
    assert torch.equal(draw_noise(48, 32, 7), noise)
    assert not torch.equal(draw_noise(48, 32, 8), noise)
    assert torch.equal(draw_noise(48, 32, 7, torch.bfloat16), noise.to(torch.bfloat16))
    # One draw known from torch itself, so that a change of generator or of order would show.
    assert torch.equal(noise, torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(7))[0])


def test_small_seeds_are_torchs_own() -> None:
    for seed in (0, 1, 2**31, 2**32 - 1):
        assert torch.equal(draw_normal((3, 20), seed), torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)))


def test_seeds_of_more_than_32_bits_are_others_and_fixed_for_ever() -> None:
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 * 2**32, 2**32 - 1, 2**32, 2**53 - 1, 2**64 - 1]
    drawn = {draw_normal((4096,), seed).numpy().tobytes() for seed in seeds}
    assert len(drawn) == len(seeds)
    # The two words of 2^53 - 1 and of 2^32 through init_by_array; numpy promises that these numbers stay.
    torch.testing.assert_close(
        draw_normal((3,), 2**53 - 1),
        torch.tensor([-0.14895635843276978, -0.21809251606464386, -0.3834342956542969]),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        draw_normal((3,), 2**32),
        torch.tensor([-0.20099112391471863, -0.9466184377670288, 0.040022674947977066]),
        rtol=0,
        atol=0,
    )
    many = draw_normal((100_000,), 2**53 - 1)
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7"])
def test_seeds_that_would_wrap_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match=r"whole number from 0 to 2\^64 - 1, got"):
        draw_normal((2,), seed)  # type: ignore[arg-type]
