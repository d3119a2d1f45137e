"""The count of FLOPs, floors and memory against numbers that others have published or that can be counted."""

import pytest
import torch
from random_models import SMALL, drawn_conditions, drawn_sequence, small_transformer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step.roofline import memory_bytes, weight_count
from uso_engine.model.modulation import ModulationLinear
from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import GPUS, Tokens, floor_ms, step_flops, step_operations
from uso_engine.model.transformer import FinalModulation, Transformer

FULL = TransformerParams()


@pytest.mark.parametrize(
    ("tokens", "tflop"), [(Tokens(), 74.4), (Tokens(content=1024), 94.9), (Tokens(style=192, content=1024), 99.0)]
)
def test_flops_of_the_full_model(tokens: Tokens, tflop: float) -> None:
    assert step_flops(FULL, tokens) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_flops_are_those_that_a_step_makes() -> None:
    transformer = small_transformer()
    # The counter knows matrix products, and not the dense attention of a CPU.
    transformer.attention_backend = "chunked"
    conditions = drawn_conditions(SMALL, seed=1, text=32, style=16, contents=((8, 8),))
    sequence = drawn_sequence(transformer, (8, 8), conditions)
    batch = PackedBatch.form([sequence])
    tokens = Tokens(text=32, style=16, image=64, content=16)
    assert batch.joint.rows == tokens.all
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(batch, torch.zeros(64, 64), sequence.modulation[:1])
    counted = counter.get_total_flops()
    assert step_flops(SMALL, tokens) == counted


def test_floors_are_the_published_ones() -> None:
    tokens = Tokens(style=192, content=1024)
    assert floor_ms(FULL, tokens, GPUS["H200"])["floor"] == pytest.approx(132, rel=0.01)
    assert floor_ms(FULL, tokens, GPUS["H200"], fp8=True)["floor"] == pytest.approx(89, rel=0.01)
    # FACTS: separately fused elementwise kernels move about 37 GB a step; GELU is a part of products here.
    moved = sum(o.bytes for o in step_operations(FULL, tokens) if o.kind == "elementwise")
    gelu = 2 * 2 * FULL.mlp_width * tokens.all * (FULL.depth + FULL.depth_single_blocks)
    assert (moved + gelu) / 1e9 == pytest.approx(37, rel=0.15)


def test_weights_are_those_of_the_model() -> None:
    with torch.device("meta"):
        transformer = Transformer(FULL)
    counted = sum(parameter.numel() for parameter in transformer.parameters())
    modulation = sum(
        parameter.numel()
        for module in transformer.modules()
        if isinstance(module, (ModulationLinear, FinalModulation))
        for parameter in module.parameters()
    )
    assert weight_count(FULL) == {"modulation": modulation, "rest": counted - modulation}


def test_memory_of_the_full_model() -> None:
    tokens = Tokens(style=192, content=1024)
    memory = memory_bytes(FULL, tokens)
    assert memory["weights"] == pytest.approx(2 * 11.901e9, rel=1e-3)
    assert memory["modulation_table"] == pytest.approx(59e6, rel=0.02)
    quantised = memory_bytes(FULL, tokens, tier="fp8")["weights"]
    without = memory_bytes(FULL, tokens, tier="fp8", keeps_modulation=False)["weights"]
    assert without == pytest.approx(9.09e9, rel=0.01)
    assert quantised - without == pytest.approx(2 * 3.247e9, rel=1e-3)
