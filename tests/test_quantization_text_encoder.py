"""T5 in 8 bits: its error on a small T5, and what is refused."""

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from uso_engine.errors import CheckpointError
from uso_engine.precision.int8_linear import Int8WeightLinear
from uso_engine.precision.text_encoder import quantize_text_encoder
from uso_engine.verification.measure import relative_error

Precision = Literal["int8", "fp8"]


@pytest.fixture(scope="module")
def encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    module = T5EncoderModel(
        T5Config(d_model=256, d_kv=64, num_heads=4, d_ff=640, num_layers=4, vocab_size=500, feed_forward_proj="gated-gelu")
    )
    module.train(False)
    return module.requires_grad_(False)


def encode(module: nn.Module) -> Tensor:
    tokens = torch.arange(64)[None] * 7 % 500
    with torch.no_grad():
        answer: Tensor = module(input_ids=tokens).last_hidden_state
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 0.008, 0.025), ("fp8", 0.03, 0.08)])
def test_error_of_an_encoded_prompt(
    encoder: T5EncoderModel, precision: Precision, least: float, most: float, dtype: torch.dtype
) -> None:
    """Four layers of random weights; bf16 alone gives 1 %."""
    truth = encode(encoder).double()
    quantized = quantize_text_encoder(nn.Module.to(copy.deepcopy(encoder), dtype), precision)
    answer = encode(quantized)
    assert answer.dtype == dtype
    assert least < relative_error(answer, truth) < most


def test_every_matrix_is_replaced_and_nothing_else(encoder: T5EncoderModel) -> None:
    quantized = quantize_text_encoder(copy.deepcopy(encoder).bfloat16(), "int8")
    replaced = {name for name, layer in quantized.named_modules() if isinstance(layer, Int8WeightLinear)}
    assert replaced == {name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    size = sum(tensor.nbytes for tensor in {id(t): t for t in quantized.state_dict().values()}.values())
    matrices = sum(layer.weight.numel() for layer in encoder.modules() if isinstance(layer, nn.Linear))
    others = sum(parameter.numel() for parameter in encoder.parameters()) - matrices
    # The embedding stands in the state twice.
    assert size < 1.05 * matrices + 2 * (others + encoder.shared.weight.numel())
    with pytest.raises(ValueError, match="quantised already"):
        quantize_text_encoder(quantized, "int8")


def test_what_is_refused_leaves_the_encoder_as_it_was(encoder: T5EncoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy.deepcopy(encoder)
    broken.get_parameter("encoder.block.2.layer.1.DenseReluDense.wo.weight")[1, 1] = float("inf")
    with pytest.raises(CheckpointError, match=r"1 matrices hold values .*block\.2\.layer\.1\.DenseReluDense\.wo"):
        quantize_text_encoder(broken, "int8")
    assert not any(isinstance(layer, Int8WeightLinear) for layer in broken.modules())
    with pytest.raises(ValueError, match="fp8 or int8, got 'int4'"):
        quantize_text_encoder(encoder, "int4")  # type: ignore[arg-type]
