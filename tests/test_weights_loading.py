"""Loading into a module on the meta device and changing its LoRAs: all or nothing, and bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from narrow_model import NARROW
from torch import Tensor, nn

from uso_engine.errors import CheckpointError, LoRAError
from uso_engine.model.transformer import Transformer
from uso_engine.weights.files.tensor_source import MemorySource
from uso_engine.weights.loading import load_parameters, merged_tensor, remerge
from uso_engine.weights.lora import LoRA, LowRankUpdate
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw, recipe_source

PARAMS = replace(NARROW, depth_single_blocks=2)
SHAPES = transformer_shapes(PARAMS)
QKV, LINEAR1, PROJ = (
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.1.linear1.weight",
    "double_blocks.0.txt_attn.proj.weight",
)
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def _empty() -> Transformer:
    with torch.device("meta"):
        return Transformer(PARAMS)


def _update(name: str, rows: int, columns: int, rank: int, scale: float = 0.7, row: int = 0, column: int = 0) -> LowRankUpdate:
    return LowRankUpdate(draw(f"{name}.down", (rank, columns)), draw(f"{name}.up", (rows, rank)), scale, row, column)


def _lora(name: str, keys: Sequence[str]) -> LoRA:
    updates = {
        key: (_update(name + key, SHAPES[key][0], SHAPES[key][1], 3), _update(name + key + "2", 8, 16, 5, row=4, column=8))
        for key in keys
    }
    return LoRA(name, "test", updates)


A, B = _lora("a", [QKV, LINEAR1]), _lora("b", [LINEAR1, PROJ])


def _loaded(loras: Sequence[tuple[LoRA, float]] = (), dtype: torch.dtype = torch.bfloat16) -> Transformer:
    module = _empty()
    load_parameters(module, recipe_source(SHAPES), device="cpu", dtype=dtype, loras=loras)
    return module


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("dtype", TYPES)
def test_every_parameter_gets_its_values_in_the_given_type(dtype: torch.dtype) -> None:
    module = _loaded(dtype=dtype)
    for key, parameter in module.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == dtype
        assert torch.equal(parameter, draw(key, SHAPES[key]).to(dtype)), key


@pytest.mark.parametrize("dtype", TYPES)
def test_merging_adds_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    module = _loaded([(A, 0.5), (B, -2.0)], dtype)
    state = module.state_dict()
    exact = draw(LINEAR1, SHAPES[LINEAR1]).double()
    for lora, strength in ((A, 0.5), (B, -2.0)):
        for update in lora.updates[LINEAR1]:
            assert isinstance(update, LowRankUpdate)
            block = exact[
                update.row_start : update.row_start + len(update.up),
                update.column_start : update.column_start + update.down.shape[1],
            ]
            block += strength * update.scale * (update.up.double() @ update.down.double())
    merged = state[LINEAR1]
    # One rounding to nearest: half a unit in the last place, and float32's own error of the sum.
    unit = torch.finfo(dtype).eps / 2
    assert ((merged.double() - exact).abs() <= unit * exact.abs() + 2e-6).all()
    assert torch.equal(state[PROJ], merged_tensor(recipe_source(SHAPES), PROJ, [(B, -2.0)], dtype=dtype))
    assert torch.equal(state["img_in.weight"], draw("img_in.weight", SHAPES["img_in.weight"]).to(dtype))


def test_the_order_of_loras_does_not_decide_the_sum() -> None:
    # Beside 1e8 the weight and A's change are lost or kept, depending on what is added first.
    big = LoRA("big", "test", {QKV: (LowRankUpdate(torch.full((1, 32), 1e8), torch.ones(96, 1)),)})
    sums = [merged_tensor(recipe_source(SHAPES), QKV, order) for order in permutations([(A, 1.0), (big, 1.0), (big, -1.0)])]
    assert all(torch.equal(one, sums[0]) for one in sums)


def test_a_strength_of_zero_changes_no_bit() -> None:
    _assert_same(_loaded([(A, 0.0), (B, 0.0)]), _loaded())


@pytest.mark.parametrize("dtype", TYPES)
def test_changed_loras_are_bit_equal_to_a_fresh_load(dtype: torch.dtype) -> None:
    chance = random.Random(3)
    source = recipe_source(SHAPES)
    module, loras = _loaded(dtype=dtype), list[tuple[LoRA, float]]()
    storage = {key: parameter.data_ptr() for key, parameter in module.named_parameters()}
    for _ in range(8):
        wanted = [(chance.choice([A, B]), chance.choice([0.0, 0.25, 1.0, -3.0])) for _ in range(chance.randint(0, 3))]
        remerge(module, source, loras, wanted)
        _assert_same(module, _loaded(wanted, dtype))
        loras = wanted
    remerge(module, source, loras, [])
    _assert_same(module, _loaded(dtype=dtype))
    assert storage == {key: parameter.data_ptr() for key, parameter in module.named_parameters()}


def test_only_touched_tensors_are_read_again() -> None:
    source = _Counting(SHAPES)
    module = _empty()
    load_parameters(module, source, device="cpu", dtype=torch.float32, loras=[(A, 1.0)])
    assert sorted(source.read_keys) == sorted(SHAPES)
    source.read_keys.clear()
    assert set(remerge(module, source, [(A, 1.0)], [(A, 1.0), (B, 0.5)])) == {LINEAR1, PROJ}
    assert set(source.read_keys) == {LINEAR1, PROJ}
    assert remerge(module, source, [(A, 1.0), (B, 0.5)], [(A, 1.0), (B, 0.5), (A, 0.0)]) == ()
    # The other order is the same sum; the other strengths are not.
    assert remerge(module, source, [(A, 1.0), (B, 0.5)], [(B, 0.5), (A, 1.0)]) == ()
    assert set(remerge(module, source, [(A, 1.0), (B, 0.5)], [(A, 0.5), (B, 1.0)])) == {QKV, LINEAR1, PROJ}


class _Counting(MemorySource):
    """Records what is read, and fails once at a given key."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], fail_at: str = "", error: BaseException | None = None) -> None:
        super().__init__({key: draw(key, shape) for key, shape in shapes.items()}, "counted")
        self.read_keys: list[str] = []
        self._fail_at, self._error = fail_at, error

    def read(self, key: str) -> Tensor:
        self.read_keys.append(key)
        if key == self._fail_at and self._error is not None:
            error, self._error = self._error, None
            raise error
        return super().read(key)


@pytest.mark.parametrize("error", [CheckpointError("gone"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_change_of_loras_leaves_every_bit_as_it_was(error: BaseException) -> None:
    module, before = _loaded([(A, 1.0)], torch.float32), _loaded([(A, 1.0)], torch.float32)
    source = _Counting(SHAPES, fail_at=PROJ, error=error)
    with pytest.raises(type(error)):
        remerge(module, source, [(A, 1.0)], [(B, 1.0)])
    assert len(source.read_keys) > 2  # two tensors had been changed
    _assert_same(module, before)


def test_an_interrupt_while_a_tensor_is_copied_is_undone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _loaded([(A, 1.0)], torch.float32)
    calls: list[Tensor] = []

    def overwrite(parameter: Tensor, value: Tensor) -> None:
        calls.append(parameter)
        parameter.copy_(value)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("uso_engine.weights.loading._overwrite", overwrite)
    with pytest.raises(KeyboardInterrupt):
        remerge(module, recipe_source(SHAPES), [(A, 1.0)], [(B, 1.0)])
    assert len(calls) == 4
    _assert_same(module, _loaded([(A, 1.0)], torch.float32))


def test_a_change_that_cannot_be_undone_says_so() -> None:
    module = _loaded([(A, 1.0)], torch.float32)
    source = _Counting(SHAPES)

    def fail_for_good(done: int, total: int) -> None:
        source._fail_at, source._error = QKV, CheckpointError("gone")
        raise KeyboardInterrupt

    with pytest.raises(CheckpointError, match="the model holds a mixture, load it again"):
        remerge(module, source, [(A, 1.0)], [], progress=fail_for_good)


def test_loras_that_do_not_fit_are_refused_before_anything_changes() -> None:
    wide = LoRA(
        "wide",
        "test",
        {QKV: (_update("w", 96, 33, 2),), PROJ: (_update("w", 33, 32, 2),), "nowhere.weight": (_update("w", 2, 2, 2),)},
    )
    bias = LoRA("bias", "test", {"img_in.bias": (_update("w", 2, 2, 2),)})
    for lora, expected in ((wide, ["columns to 33", "rows to 33", "nowhere.weight"]), (bias, ["img_in.bias"])):
        module = _empty()
        with pytest.raises(LoRAError) as caught:
            load_parameters(module, recipe_source(SHAPES), device="cpu", dtype=torch.float32, loras=[(A, 1.0), (lora, 1.0)])
        assert all(text in str(caught.value) for text in (lora.name, *expected))
        assert all(parameter.is_meta for parameter in module.parameters())
        module = _loaded([(A, 1.0)])
        with pytest.raises(LoRAError):
            remerge(module, recipe_source(SHAPES), [(A, 1.0)], [(lora, 1.0)])
        _assert_same(module, _loaded([(A, 1.0)]))
    for strength in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a finite number"):
            load_parameters(_empty(), recipe_source(SHAPES), device="cpu", dtype=torch.float32, loras=[(A, strength)])


def test_a_sum_that_overflows_is_an_error_and_undone() -> None:
    with pytest.raises(LoRAError, match="overflows float32"):
        _loaded([(A, 1e39)])
    with pytest.raises(LoRAError, match=r"overflows torch.float16; is the strength too large\?"):
        _loaded([(A, 1e6)], torch.float16)
    module = _loaded([(B, 1.0)], torch.float16)
    with pytest.raises(LoRAError, match="overflows"):
        remerge(module, recipe_source(SHAPES), [(B, 1.0)], [(B, 1.0), (A, 1e6)])
    _assert_same(module, _loaded([(B, 1.0)], torch.float16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_with_values_that_are_no_numbers_is_named_and_nothing_is_loaded(value: float) -> None:
    tensors = {key: draw(key, shape) for key, shape in SHAPES.items()}
    tensors[LINEAR1][5, 7] = value
    module = _empty()
    with pytest.raises(CheckpointError, match=f"broken: {LINEAR1} holds values that are infinite or not a number"):
        load_parameters(module, MemorySource(tensors, "broken"), device="cpu", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_value_too_large_for_the_type_is_named() -> None:
    tensors = {key: draw(key, shape) for key, shape in SHAPES.items()}
    tensors[QKV][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=f"{QKV} overflows when rounded from torch.float32 to torch.float16"):
        load_parameters(_empty(), MemorySource(tensors), device="cpu", dtype=torch.float16)


def test_missing_left_over_and_misshapen_keys_are_listed_before_anything_is_read() -> None:
    shapes = dict(SHAPES)
    del shapes[QKV]
    shapes |= {"extra": (1,), "img_in.bias": (33,)}
    source, module = _Counting(shapes), _empty()
    with pytest.raises(CheckpointError) as caught:
        load_parameters(module, source, device="cpu", dtype=torch.float32)
    for expected in (f"1 key missing: {QKV}", "1 key left over: extra", "1 key of shape [33], expected [32]: img_in.bias"):
        assert expected in str(caught.value)
    assert source.read_keys == []


def test_progress_counts_bytes_and_an_interrupt_leaves_the_module_empty() -> None:
    seen: list[tuple[int, int]] = []
    total = sum(4 * math.prod(shape) for shape in SHAPES.values())
    load_parameters(_empty(), recipe_source(SHAPES), device="cpu", dtype=torch.bfloat16, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    module = _empty()

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_parameters(module, recipe_source(SHAPES), device="cpu", dtype=torch.bfloat16, progress=interrupt)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_persistent_buffers_are_loaded_too() -> None:
    class WithBuffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(3, device="meta"))
            self.register_buffer("count", torch.empty(2, device="meta", dtype=torch.int64))

    module = WithBuffers()
    load_parameters(module, MemorySource({"table": torch.ones(3), "count": torch.arange(2)}), device="cpu", dtype=torch.float16)
    assert module.state_dict()["table"].dtype == torch.float16
    assert module.state_dict()["count"].tolist() == [0, 1]


def test_a_module_that_was_not_loaded_has_no_loras_to_change() -> None:
    with pytest.raises(ValueError, match="no loaded floating-point parameter"):
        remerge(_empty(), recipe_source(SHAPES), [], [(A, 1.0)])
    other = recipe_source(transformer_shapes(replace(PARAMS, depth_single_blocks=1)))
    with pytest.raises(CheckpointError, match=f"1 key missing: {LINEAR1}"):
        remerge(_loaded(), other, [], [(A, 1.0)])
