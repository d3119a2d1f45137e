"""One attention function, every backend that runs here, against float64 and each other on ragged lengths."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from attention_operands import exact, operands
from kernel_runs import HALF_PLACES, check_error, drawn, poisoned, run_kernel, unwritten_is_nan
from torch import Tensor
from torch.nn.attention import SDPBackend

from uso_engine.errors import BackendError
from uso_engine.loading.transformer import check_attention
from uso_engine.verification.measure import relative_error
from uso_kernels.attention import BACKENDS, BackendUnavailable, attention, available_backends, choose_backend, resolve_backends
from uso_kernels.attention.dense import dense_preference, dense_runs_on_amx
from uso_kernels.attention.triton import attention_into, attention_reference
from uso_kernels.ragged import Ragged

Place = tuple[str, torch.dtype]
# One token, one more and one less than a tile of rows and than a block of keys, several blocks.
LENGTHS = ([1], [17, 1, 40], [128], [129, 15], [300])


def launch(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, out: Tensor) -> None:
    layouts = (queries.bounds_tensor, queries.lengths_tensor, keys.bounds_tensor, keys.lengths_tensor)
    run_kernel(attention_into, q, k, v, *layouts, queries.max_capacity, out)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("place", HALF_PLACES)
def test_kernel(place: Place, lengths: list[int], head_dim: int) -> None:
    if place == ("cuda", torch.float32):
        pytest.skip("16-bit types on a GPU")
    q, k, v, layout = operands(lengths, place, head_dim=head_dim)
    out = poisoned(*q.shape, dtype=place[1], device=place[0])
    launch(q, k, v, layout, layout, out)
    expected = exact(q, k, v, layout, layout)
    check_error(out, attention_reference(q, k, v, layout, layout), expected)
    if layout.has_padding:
        assert not out[expected.abs().sum(dim=(1, 2)) == 0].any()


@pytest.mark.parametrize("place", HALF_PLACES)
def test_kernel_with_fewer_queries_and_strided_rows(place: Place) -> None:
    """The last single block's case: q picks rows; q, k and v are parts of wider tensors, the result of a wider one too."""
    _, _, _, keys = operands([150, 40], place)
    queries = Ragged.pack([33, 5], place[0])
    wide = drawn(keys.rows, 3, 2, 64, seed=5, place=place)
    q, k, v = wide[: queries.rows, 0], wide[:, 1], wide[:, 2]
    target = poisoned(queries.rows, 5, 64, dtype=place[1], device=place[0])
    launch(q, k, v, queries, keys, target[:, 1:3])
    check_error(target[:, 1:3], attention_reference(q, k, v, queries, keys), exact(q, k, v, queries, keys))
    assert target[:, 0].isnan().all()
    assert target[:, 3:].isnan().all()


def test_kernel_without_descriptors() -> None:
    """Heads that are not side by side, and a misaligned start, take the pointer variant."""
    q, k, v, layout = operands([150], ("cpu", torch.float32))
    spread = torch.zeros(layout.rows, 2, 128)
    spread[:, :, :64] = q
    flat = torch.empty(k.numel() + 1)
    misaligned = flat[1:].view(k.shape).copy_(k)
    out = poisoned(*q.shape, dtype=q.dtype)
    launch(spread[:, :, :64], misaligned, v, layout, layout, out)
    check_error(out, attention_reference(q, k, v, layout, layout), exact(q, k, v, layout, layout))


def test_a_neighbours_nan_stays_with_the_neighbour() -> None:
    q, k, v, layout = operands([40, 70], ("cpu", torch.float32))
    for x in (q, k, v):
        x[layout.span(1)] = float("nan")
    out = poisoned(*q.shape, dtype=q.dtype)
    launch(q, k, v, layout, layout, out)
    assert torch.isfinite(out[:48]).all()
    assert out[layout.span(1)].isnan().all()


# Relative to float64; the largest seen over these lengths, doubled. "chunked" rounds scores and weights to 16 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, [48, 48, 48], [40, 40]], ids=str)
def test_every_backend_that_runs_here(lengths: list[int], dtype: torch.dtype) -> None:
    q, k, v, layout = operands(lengths, ("cpu", dtype))
    expected = exact(q, k, v, layout, layout)
    ran = 0
    for name, reason in available_backends("cpu").items():
        if reason is not None or name == "triton" or (name == "dense_batched" and len(set(lengths)) > 1):
            continue
        ran += 1
        with unwritten_is_nan():
            result = attention(q, k, v, layout, layout, backend=name)
        assert relative_error(result, expected) < TOLERANCE[dtype] + BACKENDS[name].loss, name
    assert ran >= 2


def test_dense_attention_is_widened_where_a_cpu_has_no_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is the exact result, rounded once: with 8 bits, 2^-9 of a number is half a unit."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: False)
    q, k, v, layout = operands([40, 100], ("cpu", torch.bfloat16))
    result = attention(q, k, v, layout, layout, backend="dense").double()
    expected = exact(q, k, v, layout, layout)
    assert bool(((result - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all())


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, [48, 48, 48], [4608], [5824, 700]], ids=str)
def test_every_backend_that_runs_on_this_gpu(lengths: list[int]) -> None:
    q, k, v, layout = operands(lengths, ("cuda", torch.bfloat16), heads=4, head_dim=128)
    expected = exact(q, k, v, layout, layout)
    for name, reason in available_backends("cuda").items():
        if reason is None and not (name == "dense_batched" and len(set(lengths)) > 1):
            result = attention(q, k, v, layout, layout, backend=name)
            assert relative_error(result, expected) < TOLERANCE[torch.bfloat16] + BACKENDS[name].loss, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_gives_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    lengths = [33, 700, 16, 100]
    q, k, v, together = operands(lengths, ("cpu", dtype))
    result = attention(q, k, v, together, together)
    for i, length in enumerate(lengths):
        alone = Ragged.pack([length])
        rows = slice(together.starts[i], together.starts[i] + alone.rows)
        single = attention(q[rows], k[rows], v[rows], alone, alone)
        assert torch.equal(single[:length], result[together.span(i)])


def test_choice_and_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    layout = Ragged.pack([40, 17])
    assert choose_backend(cpu, torch.float32, 32) == "dense"
    for multiplies, has_amx, expected in ((True, False, "chunked"), (True, True, "dense"), (False, False, "dense")):
        monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        monkeypatch.setattr("uso_kernels.attention.dense_runs_on_amx", lambda has_amx=has_amx: has_amx)
        assert choose_backend(cpu, torch.bfloat16, 40) == expected
    q = torch.empty(layout.rows, 2, 64)
    for name in ("varlen", "xformers"):
        assert available_backends("cpu")[name] is not None
        with pytest.raises(BackendUnavailable, match=f"'{name}' cannot run.*dense"):
            resolve_backends(name, q, layout, layout)
    # What is said to run does: not one of a device whose lengths or type were just refused.
    with pytest.raises(BackendUnavailable, match=r"equal.*these can: \['dense', (?!'dense_batched')"):
        resolve_backends("dense_batched", q, layout, layout)
    with pytest.raises(ValueError, match="must be one of"):
        resolve_backends("flash", q, layout, layout)
    assert set(available_backends("cpu")) == set(BACKENDS)


def present(device: torch.device) -> None:
    """What a backend says that runs on a device."""


def absent(device: torch.device) -> str:
    return "left out"


@pytest.mark.parametrize(("there", "half", "single"), [("varlen", "varlen", "dense"), ("triton", "triton", "dense")])
def test_on_a_gpu_a_sequences_own_length_chooses(there: str, half: str, single: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither how many there are nor how long the others are: what computes a sequence is the same in any company."""
    for name in ("varlen", "triton"):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=present if name == there else absent))
    cuda = torch.device("cuda")
    assert [choose_backend(cuda, torch.bfloat16, length) for length in (1, 1023, 1024, 5824)] == [half, half, "dense", "dense"]
    assert choose_backend(cuda, torch.float32, 1) == single


def test_on_a_gpu_a_refusal_in_float32_offers_nothing_that_takes_16_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=absent if name == "chunked" else present))

    class OnGPU:
        device, dtype = torch.device("cuda"), torch.float32

    layout = Ragged.pack([64, 64])
    with pytest.raises(BackendUnavailable, match=r"got torch.float32.*these can: \['dense', 'dense_batched', 'xformers'\]$"):
        resolve_backends("varlen", OnGPU(), layout, layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[40, 17, 128, 300, 33, 129], [300, 40], [128, 16, 48]], ids=str)
def test_each_sequence_is_computed_by_the_backend_of_its_length(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with two backends of a CPU whose bits differ: the bits are those of each sequence alone."""
    by_length = {False: "chunked", True: "dense"}
    monkeypatch.setattr("uso_kernels.attention.choose_backend", lambda device, dtype, length: by_length[length >= 100])
    q, k, v, together = operands(lengths, ("cpu", torch.bfloat16))
    result = attention(q, k, v, together, together)
    assert resolve_backends("auto", q, together, together) == tuple(by_length[length >= 100] for length in lengths)
    for i, length in enumerate(lengths):
        alone, rows = Ragged.pack([length]), slice(together.starts[i], together.end(i))
        own = {name: attention(q[rows], k[rows], v[rows], alone, alone, backend=name) for name in by_length.values()}
        assert torch.equal(own[by_length[length >= 100]], result[rows])
        assert not torch.equal(own["dense"], own["chunked"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_backend_says_so() -> None:
    assert all("finds no CUDA device" in str(reason) for reason in available_backends("cuda").values())


@pytest.fixture
def amx_asked_anew() -> Iterator[None]:
    """What another test, or a failure of this one, has found out of the CPU is not kept."""
    dense_runs_on_amx.cache_clear()
    yield
    dense_runs_on_amx.cache_clear()


@pytest.mark.usefixtures("amx_asked_anew")
def test_dense_attention_that_torch_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX, limited to AVX2, PyTorch's bfloat16 attention raises from inside; float32 runs."""
    layout = Ragged.pack([32, 32])
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("uso_kernels.attention.dense._cpu_has_amx", lambda: True)
    monkeypatch.setattr("uso_kernels.attention.dense._is_limited_below_amx", lambda: True)
    for name in ("dense", "dense_batched"):
        with pytest.raises(
            BackendUnavailable, match=rf"'{name}' cannot run.*ATEN_CPU_CAPABILITY.*these can: (?!.*dense).*'chunked'"
        ):
            resolve_backends(name, torch.empty(64, 2, 64, dtype=torch.bfloat16), layout, layout)
        with pytest.raises(BackendError, match=r"ATEN_CPU_CAPABILITY.*these can: auto, (?!.*dense).*chunked"):
            check_attention(name, "cpu", torch.bfloat16)
        check_attention(name, "cpu", torch.float32)
        assert resolve_backends(name, torch.empty(64, 2, 64), layout, layout) == (name, name)
    auto = resolve_backends("auto", torch.empty(64, 2, 64, dtype=torch.bfloat16), layout, layout)
    assert auto == ("chunked", "chunked")


def test_two_threads_ask_for_cudnn_first_and_the_last_to_leave_gives_the_order_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order they enter and leave; which backends are enabled stays the caller's choice."""
    monkeypatch.setattr("uso_kernels.attention.dense._capability", lambda device: (9, 0))
    order, gpu = torch._C._get_sdp_priority_order, torch.device("cuda")
    flash, before = torch.backends.cuda.flash_sdp_enabled(), order()
    cudnn = SDPBackend.CUDNN_ATTENTION.value
    assert before[0] != cudnn
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        first, second = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        for ways in ((first, second), (second, first)):
            held = {thread: thread.submit(dense_preference, gpu).result() for thread in (first, second)}
            for thread in (first, second):
                thread.submit(held[thread].__enter__).result()
                assert order()[0] == cudnn and sorted(order()) == sorted(before)
            with dense_preference(gpu):  # A call within a step.
                assert order()[0] == cudnn
            ways[0].submit(held[ways[0]].__exit__, None, None, None).result()
            assert order()[0] == cudnn
            ways[1].submit(held[ways[1]].__exit__, None, None, None).result()
            assert order() == before
        assert not torch.backends.cuda.flash_sdp_enabled()
        with pytest.raises(KeyError), dense_preference(gpu):
            raise KeyError
        assert order() == before
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch._C._set_sdp_priority_order(before)


def test_gradients_flow_through_the_default() -> None:
    q, k, v, layout = operands([32], ("cpu", torch.bfloat16))
    leaf = k.clone().requires_grad_()
    attention(q, leaf, v, layout, layout).float().square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_operation_keeps_torchs_rules() -> None:
    q, k, v, layout = operands([32], ("cpu", torch.float32))
    layouts = (layout.bounds_tensor, layout.lengths_tensor) * 2
    torch.library.opcheck(attention_into.op, (q, k, v, *layouts, layout.max_capacity, torch.empty_like(q)))


def test_bad_operands_are_refused() -> None:
    q, k, v, layout = operands([32], ("cpu", torch.float32))
    with pytest.raises(ValueError, match="one float dtype"):
        attention(q, k.half(), v, layout, layout)
    with pytest.raises(ValueError, match="rows"):
        attention(q[:16], k, v, layout, layout)
    with pytest.raises(ValueError, match="as many sequences"):
        attention(q, k, v, Ragged.pack([16, 16]), layout)
    with pytest.raises(ValueError, match="contiguous heads"):
        attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, layout, layout)
    with pytest.raises(ValueError, match="at least one token"):
        Ragged.pack([32, 0])
    small = torch.empty(32, 2, 32)
    with pytest.raises(ValueError, match=r"\(64, 128\) have kernels, got 32"):
        launch(small, small, small, layout, layout, small.clone())
