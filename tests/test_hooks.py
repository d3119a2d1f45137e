"""Hooks: every layer's is called and its answer counts, in whatever way a step would have computed the layer without it."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from graphed_denoisers import counts, jobs_of, made
from random_models import SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from uso_engine.model.hooks import LayerGroup
from uso_engine.model.linear import Linear
from uso_engine.model.packing import PackedBatch
from uso_engine.model.transformer import Transformer
from uso_engine.precision.int4_linear import Int4Linear
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.profiling.step_work import counted_steps
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.verification.measure import relative_error

KINDS: dict[str, type[QuantizedLinear] | None] = {"float": None, "int8": Int8Linear, "int4": Int4Linear}
MODULES = dict(small_transformer().named_modules())
LAYERS = [name for name, module in MODULES.items() if isinstance(module, Linear)]
GROUPS = [name for name, module in MODULES.items() if isinstance(module, LayerGroup)]


@cache
def pristine(kind: type[QuantizedLinear] | None) -> Transformer:
    """Drawn once, for all tests to copy."""
    transformer = small_transformer()
    if kind is not None:
        quantise(transformer, kind)
    return transformer


class Subject:
    """A transformer and what it takes; the batch's rows are in joint order or not."""

    def __init__(self, kind: type[QuantizedLinear] | None = None, *, in_order: bool = True) -> None:
        self.transformer, self.in_order = deepcopy(pristine(kind)), in_order

    def admitted(self) -> tuple[PackedBatch, Tensor, Tensor]:
        """The batch, latents and modulation, which the layers at admission have a part in."""
        grids, texts = ([(4, 8)], [28]) if self.in_order else ([(3, 5), (4, 4)], [10, 17])
        sequences = [
            drawn_sequence(self.transformer, grid, drawn_conditions(SMALL, seed=seed, text=text, style=4))
            for seed, (grid, text) in enumerate(zip(grids, texts, strict=True))
        ]
        batch = PackedBatch.form(sequences)
        assert batch.is_in_order == self.in_order
        latents = torch.randn(batch.output.rows, SMALL.in_channels, generator=torch.Generator().manual_seed(0))
        return batch, latents, torch.stack([sequence.modulation[0] for sequence in sequences])

    def velocities(self) -> list[Tensor]:
        """Of two steps of one run, the second with what the first has prepared."""
        batch, latents, modulation = self.admitted()
        run = self.transformer.run_of(batch)
        return [self.transformer(run, latents, modulation) for _ in range(2)]


def doubled(layer: nn.Module) -> None:
    """Let a layer's result be twice what it was."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name in ("bias", "weight" if isinstance(layer, Linear) else "scale", "shift"):
            tensor.mul_(2)


@pytest.fixture(scope="module")
def plain() -> Callable[[str, bool], Tensor]:
    """The velocity without hooks of a kind and order."""
    found: dict[tuple[str, bool], Tensor] = {}

    def velocity(kind: str, in_order: bool) -> Tensor:
        if (kind, in_order) not in found:
            found[kind, in_order] = Subject(KINDS[kind], in_order=in_order).velocities()[0]
        return found[kind, in_order]

    return velocity


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("kind", "in_order"), [("float", True), ("float", False), ("int8", True), ("int4", False)])
@torch.no_grad()
def test_every_layers_hook_is_called_and_its_answer_counts(
    kind: str, in_order: bool, name: str, plain: Callable[[str, bool], Tensor]
) -> None:
    """A hook that doubles a layer's result gives what a layer with doubled values gives: in the fused products too."""
    hooked, other = (Subject(KINDS[kind], in_order=in_order) for _ in range(2))
    doubled(other.transformer.get_submodule(name))
    seen: list[tuple[int, ...]] = []

    def double(layer: nn.Module, given: object, result: Tensor) -> Tensor:
        seen.append(tuple(result.shape))
        return 2 * result

    hooked.transformer.get_submodule(name).register_forward_hook(double)
    results = hooked.velocities()
    assert len(seen) >= 1
    for result in results:
        assert relative_error(result, other.velocities()[0]) < 2e-6
        assert not torch.allclose(result, plain(kind, in_order), rtol=1e-3)
    pieces = {shape[1] for shape in seen}
    if name.startswith("single_blocks") and name.endswith("linear1"):
        is_last = name == f"single_blocks.{SMALL.depth_single_blocks - 1}.linear1"
        assert pieces == ({3 * SMALL.hidden_size, SMALL.mlp_width} if is_last else {3 * SMALL.hidden_size + SMALL.mlp_width})
    else:
        assert len(pieces) == 1


@pytest.mark.parametrize("name", ["double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "single_blocks.1.linear2"])
@torch.no_grad()
def test_a_hook_that_only_looks_changes_no_more_than_rounding(name: str, plain: Callable[[str, bool], Tensor]) -> None:
    subject = Subject()
    batch, latents, modulation = subject.admitted()
    run = subject.transformer.run_of(batch)
    before = subject.transformer(run, latents, modulation)
    seen: list[Tensor] = []
    handle = subject.transformer.get_submodule(name).register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    assert relative_error(subject.transformer(run, latents, modulation), before) < 2e-6
    assert seen and all(
        isinstance(x, Tensor) and x.shape[1] == subject.transformer.get_submodule(name).in_features for x in seen
    )
    handle.remove()
    assert torch.equal(subject.transformer(run, latents, modulation), before)
    assert torch.equal(before, plain("float", True))


@torch.no_grad()
def test_a_hook_on_all_modules_sees_every_layer_of_a_step() -> None:
    subject = Subject()
    batch, latents, modulation = subject.admitted()
    run = subject.transformer.run_of(batch)
    subject.transformer(run, latents, modulation)
    names = {module: name for name, module in subject.transformer.named_modules()}
    seen: set[str] = set()
    handle = register_module_forward_hook(lambda module, given, result: seen.add(names[module]))
    try:
        subject.transformer(run, latents, modulation)
    finally:
        handle.remove()
    at_admission = ("time_in", "guidance_in", "vector_in", "txt_in", "_mod.", "modulation", "adaLN")
    assert seen & set(LAYERS) == {name for name in LAYERS if not any(part in name for part in at_admission)}
    seen.clear()
    subject.transformer(run, latents, modulation)
    assert not seen


@torch.no_grad()
def test_a_forward_that_was_set_on_a_layer_is_called(plain: Callable[[str, bool], Tensor]) -> None:
    """Also after a step has been prepared, and taken away again."""
    subject, other = Subject(), Subject()
    layer = subject.transformer.get_submodule("single_blocks.0.linear2")
    doubled(other.transformer.get_submodule("single_blocks.0.linear2"))
    batch, latents, modulation = subject.admitted()
    run = subject.transformer.run_of(batch)
    subject.transformer(run, latents, modulation)
    forward = layer.forward
    layer.forward = lambda *given, **named: 2 * forward(*given, **named)
    result = subject.transformer(run, latents, modulation)
    assert relative_error(result, other.velocities()[0]) < 2e-6
    del layer.forward
    assert torch.equal(subject.transformer(run, latents, modulation), plain("float", True))


def test_backward_hooks_are_called() -> None:
    subject = Subject()
    batch, latents, modulation = subject.admitted()
    subject.transformer.requires_grad_(True)
    seen: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, given: object, result: tuple[Tensor, ...]) -> None:
        seen[name] = result[0]

    for name in LAYERS:
        subject.transformer.get_submodule(name).register_full_backward_hook(partial(keep, name))
    subject.transformer(batch, latents.requires_grad_(), modulation.detach().requires_grad_()).square().mean().backward()
    blocks = [name for name in LAYERS if "blocks" in name and not ("_mod." in name or "modulation" in name)]
    assert {*blocks, "img_in", "final_layer.linear"} == set(seen)
    assert all(torch.isfinite(gradient).all() for gradient in seen.values())


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_no_step_calls_refuse_hooks(name: str) -> None:
    group = MODULES[name]
    kinds = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "backward_hook")
    for kind in kinds:
        with pytest.raises(ValueError, match=f"no step calls {type(group).__name__}.*hook into"):
            getattr(group, f"register_{kind}")(lambda *given: None)


def test_the_refusal_names_the_layers_to_hook_into() -> None:
    messages = []
    for name in ("double_blocks.0.img_attn", "double_blocks.0.img_mlp", "single_blocks.0.norm", "final_layer"):
        with pytest.raises(ValueError, match="hook into") as error:
            MODULES[name].register_forward_hook(lambda *given: None)
        messages.append(str(error.value).partition("hook into ")[2])
    assert messages == [
        "its layers (qkv, proj)",
        "its layers (0, 2)",
        "the block, or the projection it follows",
        "its layers (linear, adaLN_modulation, adaLN_modulation.1)",
    ]


@torch.no_grad()
def test_no_other_module_is_left_uncalled() -> None:
    """Layers, groups, blocks and what is called at admission: nothing else is there, but lists, which PyTorch never calls."""
    subject, called = Subject(), set[nn.Module]()
    handle = register_module_forward_hook(lambda module, given, result: called.add(module))
    try:
        subject.velocities()
    finally:
        handle.remove()
    left = [module for module in subject.transformer.modules() if module not in called]
    assert left and all(isinstance(module, (LayerGroup, nn.ModuleList)) for module in left)


def test_hooks_of_the_transformer_itself_are_called_for_captured_and_repeated_steps() -> None:
    """Once for each step, and what they answer counts once: a step's work is counted so, and profiles are marked."""
    denoiser, graphs, _ = made()
    plain = Denoiser(small_transformer())
    with counted_steps(denoiser._transformer) as counted, counted_steps(plain._transformer) as expected:
        for each in (denoiser, plain):
            each._transformer.register_forward_hook(lambda module, given, result: 2 * result)
        jobs, others = jobs_of(denoiser, 0), jobs_of(plain, 0)
        for _ in range(6):
            velocities = zip(denoiser.step(jobs), plain.step(others), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in velocities)
    assert counts(graphs) == (1, 3, 2, 1)
    assert counted.sequences == expected.sequences and sum(counted.sequences.values()) == 6
