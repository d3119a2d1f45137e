"""8-bit attention: kernels against references, its error, and what makes 8-bit attention fail elsewhere: outliers, company."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_operands import CPU, exact
from attention_operands import operands as drawn_operands
from kernel_runs import HALF_PLACES, drawn, poisoned, run_kernel, unwritten_is_nan
from torch import Tensor

from uso_engine.verification.measure import relative_error
from uso_kernels.attention import BACKENDS, attention, available_backends, choose_backend
from uso_kernels.attention.quantize_heads import GENERATIONS, quantize_heads, quantize_heads_into
from uso_kernels.attention.quantize_values import quantize_values, quantize_values_into, value_amax_into
from uso_kernels.attention.triton_eight_bit import CONFIGS, eight_bit_attention_into
from uso_kernels.launch import COMPUTE_CAPABILITIES
from uso_kernels.ragged import Ragged

Place = tuple[str, torch.dtype]
# One token, one more and one less than a block of keys and than a tile of rows, padding between sequences.
LENGTHS = ([17, 1, 40], [128], [129, 15], [300])
# Queries and keys as a norm leaves them, values with a mean.
operands = partial(drawn_operands, means=(0.0, 0.0, 0.5))
FLIPS = 1e-3
"""What kernel and reference may differ by: a weight on the border between two numbers of e4m3 falls on either side."""
Attend = Callable[[Tensor, Tensor, Tensor, Ragged, Ragged], Tensor]
Enlarge = Callable[[Tensor, Tensor, Tensor], None]


def by_backend(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    return attention(q, k, v, queries, keys, backend="8bit")


def by_kernels(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """The four kernels one after another, into memory that shows what nobody wrote."""
    (rows, heads, head_dim), count = q.shape, k.shape[0]
    place = {"device": str(q.device)}
    quantized = [
        made
        for n in (rows, count)
        for made in (
            poisoned(n, heads, head_dim, dtype=torch.int8, **place),
            poisoned(heads, n, dtype=torch.float32, **place),
        )
    ]
    run_kernel(quantize_heads_into, q, k, *quantized)
    amax = torch.zeros(len(keys), heads, head_dim, device=q.device)
    where = keys.bounds_tensor, keys.lengths_tensor
    run_kernel(value_amax_into, v, *where, keys.max_length, amax)
    values = poisoned(heads, head_dim, count, dtype=torch.float8_e4m3fn, **place)
    run_kernel(quantize_values_into, v, amax, *where, keys.max_capacity, values)
    out = poisoned(*q.shape, dtype=q.dtype, **place)
    bounds = (queries.bounds_tensor, queries.lengths_tensor, *where)
    run_kernel(eight_bit_attention_into, *quantized, values, amax, *bounds, queries.max_capacity, out)
    return out


BOTH = pytest.mark.parametrize("attend", [by_backend, by_kernels])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("place", HALF_PLACES)
def test_kernels_do_what_their_references_do(place: Place, lengths: list[int], head_dim: int) -> None:
    """The interpreter, too, rounds weights to e4m3, against the same maxima."""
    if place[0] == "cuda" and available_backends("cuda")["8bit"] is not None:
        pytest.skip(str(available_backends("cuda")["8bit"]))
    q, k, v, layout = operands(lengths, place, head_dim=head_dim)
    result = by_kernels(q, k, v, layout, layout)
    here = Ragged.pack(lengths)
    expected = by_backend(q.cpu(), k.cpu(), v.cpu(), here, here)
    # On a GPU blocks of keys and the products' sums are others, so weights are rounded otherwise.
    assert relative_error(result, expected) <= (FLIPS if place[0] == "cpu" else 0.02)
    if layout.token_rows is not None:
        padding = torch.ones(layout.rows, dtype=torch.bool)
        padding[layout.token_rows.cpu()] = False
        assert not result.cpu()[padding].any()


def test_what_quantised_operands_are_worth() -> None:
    """Multiplied out, every number is within half a step of what it was; each scale is that of its own largest."""
    q, k, v, layout = operands([40, 16], head_dim=128)
    q[3, 1] = 0.0
    for x, values, scale in zip((q, k), *[iter(quantize_heads(q, k)[i::2]) for i in range(2)], strict=True):
        worth, tokens = values.float() * scale.t()[:, :, None], layout.token_rows
        assert bool(((worth - x)[tokens].abs() <= 0.5001 * scale.t()[tokens][:, :, None]).all())
        assert torch.equal(values[tokens].abs().amax(2) == 127, x[tokens].abs().amax(2) > 0)
    values, amax = quantize_values(v, layout)
    for i in range(2):
        rows = layout.span(i)
        assert torch.equal(amax[i], v[rows].abs().amax(0))
        worth = values[:, :, rows].float().permute(2, 0, 1) * (amax[i] / 448)
        assert bool(((worth - v[rows]).abs() <= v[rows].abs() / 16 + amax[i] * 2**-10 / 448).all())
    assert not values[:, :, 40:48].float().any()


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_is_within_what_the_backend_says(head_dim: int, mean: float) -> None:
    """Without a mean of the values, the result is what is left of them, and the error is largest beside it."""
    q, k, v, layout = operands([512], heads=4, head_dim=head_dim)
    v = v - 0.5 + mean
    error = relative_error(by_backend(q, k, v, layout, layout), exact(q, k, v, layout, layout))
    assert 2e-3 < error < BACKENDS["8bit"].loss


@BOTH
def test_bits_are_the_same_in_any_company(attend: Attend) -> None:
    """Beside a neighbour a thousand times as large, and one that is not finite, each scale is that of its own sequence."""
    lengths = [33, 130, 16, 47]
    q, k, v, together = operands(lengths)
    v[together.span(1)] *= 1000
    for x in (q, k, v):
        x[together.span(3)] = float("nan")
    result = attend(q, k, v, together, together)
    for i, length in enumerate(lengths[:3]):
        alone, rows = Ragged.pack([length]), slice(together.starts[i], together.end(i))
        assert torch.equal(attend(q[rows], k[rows], v[rows], alone, alone), result[rows])
    assert result[:192].isfinite().all()
    assert result[together.span(3)].isnan().all()


@BOTH
def test_fewer_queries_and_strided_operands(attend: Attend) -> None:
    """The last single block's case: q picks rows; values lie where the projection wrote them."""
    _, _, _, keys = operands([150, 40])
    queries = Ragged.pack([33, 5])
    wide = drawn(keys.rows, 3, 2, 64, seed=5, place=CPU)
    q, k, v = wide[: queries.rows, 0], wide[:, 1], wide[:, 2]
    with unwritten_is_nan():
        result = attend(q, k, v, queries, keys)
    assert relative_error(result, exact(q, k, v, queries, keys)) < BACKENDS["8bit"].loss


def large_style_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tokens in front whose values are 30 times the others', and to which everybody attends."""
    v[:4] *= 30
    k[:4] += 0.5 * q.mean(0)


def one_channel(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k, v):
        x[:, :, 7] *= 100


def one_token(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x in (q, k, v):
        x[5] *= 1000


def as_large_as_float16(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Any mean of these values is one of float16's largest numbers, or the error made it infinite."""
    v.copy_(torch.where(v > 0.5, 65504.0, 65000.0))


# Relative to float64: the largest error seen, doubled.
OUTLIERS: dict[Enlarge, float] = {large_style_tokens: 0.033, one_channel: 0.1, one_token: 0.15, as_large_as_float16: 0.007}
# The scale times 448 is the largest value but for a rounding of float32.
NO_LARGER = 1 + 2**-22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enlarge", OUTLIERS, ids=lambda enlarge: enlarge.__name__)
def test_outliers(enlarge: Enlarge, dtype: torch.dtype) -> None:
    q, k, v, layout = operands([256], heads=4, head_dim=128)
    enlarge(q, k, v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    result = by_backend(q, k, v, layout, layout)
    assert result.isfinite().all()
    assert relative_error(result, exact(q, k, v, layout, layout)) < OUTLIERS[enlarge]
    assert bool((result.abs().amax(0) <= v.abs().amax(0) * NO_LARGER).all())


@pytest.mark.parametrize("enlarge", OUTLIERS, ids=lambda enlarge: enlarge.__name__)
def test_outliers_in_the_kernels(enlarge: Enlarge) -> None:
    q, k, v, layout = operands([144])
    enlarge(q, k, v)
    result = by_kernels(q, k, v, layout, layout)
    assert result.isfinite().all()
    assert relative_error(result, by_backend(q, k, v, layout, layout)) <= FLIPS
    assert relative_error(result, exact(q, k, v, layout, layout)) < OUTLIERS[enlarge]
    assert bool((result.abs().amax(0) <= v.abs().amax(0) * NO_LARGER).all())


@BOTH
def test_a_result_is_never_larger_than_the_largest_value(attend: Attend) -> None:
    """Weights of 1 and of 17/32 each, which e4m3 makes 0.5625: more than all, which would be more than the values."""
    q, k, v = (torch.ones(32, 1, 64) for _ in range(3))
    q *= 8 / math.sqrt(64)
    k[1:] = 1 + math.log(17 / 32) / 8
    layout = Ragged.pack([32])
    assert bool((attend(q, k, v, layout, layout) == 1).all())


@BOTH
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_was(attend: Attend, broken: float) -> None:
    """A query's in its own row; a value's in its own channel; a key's in every row of its head."""
    for position, where in ((0, (3, 1, slice(None))), (2, (slice(None), 1, 5)), (1, (slice(None), 1, slice(None)))):
        tensors = [*operands([48])[:3]]
        tensors[position][3, 1, 5] = broken
        layout = Ragged.pack([48])
        expected = torch.ones(48, 2, 64, dtype=torch.bool)
        expected[where] = False
        assert torch.equal(attend(tensors[0], tensors[1], tensors[2], layout, layout).isfinite(), expected)


def test_auto_never_chooses_what_is_lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, backend in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, replace(backend, missing=lambda device: None))
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for length in (1, 1023, 1024, 5824):
                assert not BACKENDS[choose_backend(torch.device(device), dtype, length)].loss
    assert [name for name, backend in BACKENDS.items() if backend.loss] == ["8bit"]


def test_it_has_no_gradient() -> None:
    q, k, v, layout = operands([32])
    with pytest.raises(ValueError, match="'8bit' rounds to 8 bits and has no gradient"):
        attention(q.requires_grad_(), k, v, layout, layout, backend="8bit")


def test_heads_and_gpus_without_kernels() -> None:
    small, layout = torch.zeros(16, 2, 32), Ragged.pack([16])
    by_backend(small, small, small, layout, layout)
    with pytest.raises(ValueError, match=r"\(64, 128\) have kernels, got 32"):
        by_kernels(small, small, small, layout, layout)
    q, k, v, layout = operands([16])
    given = (*quantize_heads(q, k), *quantize_values(v, layout), *(layout.bounds_tensor, layout.lengths_tensor) * 2, 16, q)
    assert set(GENERATIONS) == set(CONFIGS)
    for generation in set(COMPUTE_CAPABILITIES) - set(CONFIGS):
        with pytest.raises(ValueError, match=f"got {generation}"):
            eight_bit_attention_into.launch(generation, *given)
