"""Whole tiers on the reference cases' small model: errors within the promised bounds, LoRAs, and what is refused."""

import pytest
import torch
from random_models import drawn_conditions
from torch import Tensor

from uso_engine.errors import BackendError, CheckpointError, ConfigError, LoRAError
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS, TierName, tiers_of_gpu
from uso_engine.precision.transformer import DTYPES, check_tier, layer_formats, linears, quantized_transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise, token_grid
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule
from uso_engine.verification.measure import bound_for, relative_error
from uso_engine.verification.small_model import small_params
from uso_engine.weights.files.tensor_source import MemorySource, TensorSource
from uso_engine.weights.loaded_quantized import LoadedQuantizedTransformer
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.lora import LoRA, LowRankUpdate
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.recipe import draw, recipe_source

PARAMS = small_params(guidance_embed=True)
STEPS = 3
INEXACT = [name for name, tier in TIERS.items() if not tier.is_exact]
LAVISH = 5
"""How many times the error a bound may be at most: those of the tiers there are have 1.4 to 3.1 times the errors here."""


def pristine(salt: str = "", **changes: float) -> TensorSource:
    """Weights by the recipe; `changes` puts a number into one element of a tensor, by key with ``__`` for dots."""
    shapes = transformer_shapes(PARAMS)
    if not changes:
        return recipe_source(shapes, salt=salt)
    tensors = {key: draw(key, shape, salt) for key, shape in shapes.items()}
    for key, value in changes.items():
        tensors[key.replace("__", ".")].view(-1)[7] = value
    return MemorySource(tensors, "changed weights")


def lora(salt: str, *, key: str = "single_blocks.1.linear1.weight", factor: float = 1.0) -> LoRA:
    rows, columns = transformer_shapes(PARAMS).get(key, (96, 256))
    up, down = factor * draw(f"{key}.up", (rows, 4), salt), draw(f"{key}.down", (4, columns), salt)
    return LoRA(salt, "usual", {key: (LowRankUpdate(down, up, 1.0, 0, 0),)})


def floating(source: TensorSource) -> Transformer:
    with torch.device("meta"):
        module = Transformer(PARAMS)
    load_parameters(module, source, device="cpu", dtype=torch.float32)
    return module.eval()


def run(
    module: Transformer, *, width: int, height: int, seed: int, style: int, contents: tuple[tuple[int, int], ...]
) -> list[Tensor]:
    """First velocity and last latent."""
    sigmas = schedule(STEPS, width, height)
    conditions = drawn_conditions(PARAMS, seed=seed, text=32, style=style, contents=contents)
    sequence = admit(module, conditions, token_grid(width, height), sigmas, 4.0)
    denoiser = DenoisingRun(module, [ImageJob(sequence, draw_noise(width, height, seed), tuple(sigmas))])
    steps = [denoiser.step() for _ in range(1)]
    first = steps[0].velocities[0].float().clone()
    denoiser.run()
    return [first, denoiser.latents()[0]]


@pytest.mark.parametrize(
    ("salt", "width", "height", "style", "contents"),
    [("one ", 96, 64, 24, ((12, 8),)), ("two ", 64, 80, 0, ()), ("three ", 48, 48, 48, ((8, 8), (6, 10)))],
)
def test_tiers_stay_within_their_bounds_and_need_them(
    salt: str, width: int, height: int, style: int, contents: tuple[tuple[int, int], ...]
) -> None:
    source = pristine(salt)

    def answer(module: Transformer) -> list[Tensor]:
        return run(module, width=width, height=height, seed=len(salt), style=style, contents=contents)

    truth = answer(floating(source))
    errors = {}
    for tier in INEXACT:
        if TIERS[tier].is_quantized:
            module = quantize(PARAMS, source, layer_formats(PARAMS, tier))
        else:
            module = floating(source).to(DTYPES[TIERS[tier].dtype])
        errors[tier] = [relative_error(a, b) for a, b in zip(answer(module), truth, strict=True)]
        for name, error in zip(("velocity.0", "unpacked"), errors[tier], strict=True):
            bound = bound_for(name, tier, STEPS - 1)
            assert bound is not None
            assert bound / LAVISH <= error <= bound, (tier, name, error)
    # Nothing would be quantised if a cruder tier were not worse.
    assert errors["int8"][0] < errors["fp8"][0] < errors["int4"][0]


def test_default_kinds() -> None:
    counts = {tier: layer_formats(PARAMS, tier) for tier in QUANTIZED_TIERS}
    assert set(counts["fp8"]) == set(linears(PARAMS))
    for tier, formats in counts.items():
        assert (
            formats["img_in"] == formats["txt_in"] == formats["final_layer.linear"] == formats["vector_in.in_layer"] == "float"
        )
        assert formats["double_blocks.1.img_attn.qkv"] == TIERS[tier].blocks
        assert formats["double_blocks.0.img_attn.qkv"] == formats["single_blocks.2.linear2"] == TIERS[tier].sensitive
        assert formats["single_blocks.1.modulation.lin"] == formats["final_layer.adaLN_modulation.1"] == TIERS[tier].modulation
    assert layer_formats(PARAMS, "int8", int8_activations=True)["single_blocks.0.linear1"] == "int8"


def test_keep_patterns() -> None:
    formats = layer_formats(PARAMS, "fp8", keep=["single_blocks.-2", "double_blocks.*.txt_mlp.0"])
    kept = [name for name, kind in formats.items() if kind == "float" and name.startswith(("double", "single"))]
    assert [name for name in kept if "mod" not in name] == [
        "double_blocks.0.txt_mlp.0",
        "double_blocks.1.txt_mlp.0",
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    ]
    assert layer_formats(PARAMS, "fp8", keep=[])["double_blocks.0.img_attn.qkv"] == "fp8"
    with pytest.raises(ConfigError, match=r"match no layer: double_blocks\.9, linear3; names look like"):
        layer_formats(PARAMS, "fp8", keep=["double_blocks.9", "linear3", "single_blocks.0"])


def test_widths_that_no_tile_fits_stay_in_floating_point() -> None:
    narrow = TransformerParams(
        in_channels=4, vec_in_dim=8, context_in_dim=8, hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(4, 4, 4), mlp_ratio=2,
    )  # fmt: skip
    assert set(layer_formats(narrow, "int4").values()) == {"float"}


def test_tiers_by_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fp8" in tiers_of_gpu((8, 9)) and "fp8" in tiers_of_gpu((12, 0))
    assert set(tiers_of_gpu((8, 6))) >= {"float32", "bf16", "int8", "int4"} and "fp8" not in tiers_of_gpu((8, 6))
    assert tiers_of_gpu((7, 5)) == ("float32",)
    check_tier("fp8", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(BackendError, match=r"'fp8' needs compute capability 8\.9.*RTX 3090 has 8\.6; .*: float32, bf16, int8"):
        check_tier("fp8", torch.device("cuda"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_weights_that_are_no_numbers_are_refused(tier: TierName, value: float) -> None:
    source = pristine(single_blocks__1__linear2__weight=value)
    with pytest.raises(CheckpointError, match=r"single_blocks\.1\.linear2\.weight holds values that are infinite or not a n"):
        quantize(PARAMS, source, layer_formats(PARAMS, tier))


def test_loras_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    formats = layer_formats(PARAMS, "fp8")
    with pytest.raises(LoRAError, match=r"strange changes weights that the model does not have: single_blocks\.7"):
        quantize(PARAMS, pristine(), formats, loras=[(lora("strange", key="single_blocks.7.linear1.weight"), 1.0)])
    with pytest.raises(LoRAError, match="overflows"):
        quantize(PARAMS, pristine(), formats, loras=[(lora("strong", factor=1e3), 3e38)])
    with pytest.raises(CheckpointError, match="left over"):
        quantize(small_params(guidance_embed=False), pristine(), formats)


@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_lora_is_merged_before_quantising(tier: TierName) -> None:
    """The quantised merged weight is as near to the merged weight as quantising allows, and not to the pristine one."""
    key, extra = "single_blocks.1.linear1.weight", lora("style")
    module = quantize(PARAMS, pristine(), layer_formats(PARAMS, tier), loras=[(extra, 0.5)])
    weight = draw(key, transformer_shapes(PARAMS)[key])
    merged = weight.clone()
    extra.updates[key][0].add_to(merged, 0.5)
    layer = module.get_submodule(key.removesuffix(".weight"))
    assert isinstance(layer, QuantizedLinear)
    restored = layer.dequantized_weight()
    assert relative_error(restored, merged) < 0.12
    assert relative_error(restored, weight) > 0.3


@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_other_loras_give_what_loading_afresh_gives(tier: TierName) -> None:
    source, formats, own = pristine(), layer_formats(PARAMS, tier), lora("own")
    extra = lora("extra", key="double_blocks.1.img_attn.qkv.weight")

    def state(module: Transformer) -> dict[str, Tensor]:
        return {key: tensor.clone().view(torch.uint8) for key, tensor in module.state_dict().items()}

    def afresh(*loras: tuple[LoRA, float]) -> dict[str, Tensor]:
        return state(quantize(PARAMS, source, formats, loras=loras))

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    loaded = LoadedQuantizedTransformer(
        quantize(PARAMS, source, formats, loras=[(own, 1.0)]), tier, (source, [(own, 1.0)]), formats
    )
    before = state(loaded.module)
    assert not same(before, afresh())
    touched = loaded.set_loras([(extra, 0.7)])
    assert set(touched) == {"single_blocks.1.linear1.weight", "double_blocks.1.img_attn.qkv.weight"}
    assert same(state(loaded.module), afresh((own, 1.0), (extra, 0.7)))
    loaded.set_loras([(extra, 0.7)], keep_configured=False)
    assert same(state(loaded.module), afresh((extra, 0.7)))
    # One that fails half-way changes nothing.
    with pytest.raises(LoRAError, match="overflows"):
        loaded.set_loras([(extra, 0.2), (lora("strong", factor=1e3), 3e38)])
    assert same(state(loaded.module), afresh((extra, 0.7)))
    loaded.set_loras([])
    assert same(state(loaded.module), before)
    loaded.close()
    with pytest.raises(CheckpointError, match="was closed"):
        loaded.set_loras([])


def test_sizes_of_the_real_model() -> None:
    """10^9 bytes resident with modulation linears off the GPU, from meta tensors."""
    params = TransformerParams()
    limits: dict[TierName, float] = {"fp8": 9.1, "int4": 4.9}
    for tier, most in limits.items():
        state = quantized_transformer(params, layer_formats(params, tier)).state_dict()
        resident = sum(tensor.nbytes for key, tensor in state.items() if "mod" not in key)
        assert 0.9 * most < resident / 1e9 <= most
        assert all(tensor.is_meta for tensor in state.values())
