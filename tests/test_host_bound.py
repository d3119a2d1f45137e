"""Which steps are captured where that is automatic, and where none can be."""

from pathlib import Path

import pytest
import torch

from uso_engine.config import load_config
from uso_engine.engine import USOEngine
from uso_engine.errors import BackendError, ConfigError
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Tokens, step_flops
from uso_engine.sampling.host_bound import gpu_ms, host_ms
from uso_engine.sampling.step_graphs import why_no_graphs

CPU = torch.device("cpu")


def test_which_steps_keep_the_host_busier() -> None:
    """A large picture keeps every GPU busy, a small one a fast GPU not; more work and slower GPUs never turn it round."""
    flux = TransformerParams()
    large = step_flops(flux, Tokens(style=192, content=1024))
    assert large == pytest.approx(98.5e12, rel=0.01)  # docs/performance.md
    small = step_flops(flux, Tokens(image=256))
    assert gpu_ms(large, (9, 0)) > 5 * host_ms(flux, 1)
    assert gpu_ms(small, (10, 0)) < host_ms(flux, 1) < gpu_ms(small, (8, 6))
    assert gpu_ms(small, (9, 0), eight_bits=True) < gpu_ms(small, (9, 0))
    assert gpu_ms(small, (13, 0)) == gpu_ms(small, (12, 0)) and gpu_ms(small, (7, 5)) >= gpu_ms(small, (8, 6))
    assert host_ms(flux, 2) > host_ms(flux, 1)


def test_graphs_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    assert why_no_graphs("auto", CPU, has_plan=False) == "a CPU has no CUDA graphs"
    assert why_no_graphs("off", torch.device("cuda"), has_plan=True) == 'cuda_graphs is "off"'
    assert "memory plan" in str(why_no_graphs("auto", torch.device("cuda"), has_plan=True))
    assert why_no_graphs("auto", torch.device("cuda"), has_plan=False) is None
    assert "other processes" in str(why_no_graphs("auto", torch.device("cuda"), has_plan=False, is_shared=True))
    with pytest.raises(BackendError, match=r'"on" cannot be done here: a memory plan .*"auto"'):
        why_no_graphs("on", torch.device("cuda"), has_plan=True)
    config = load_config("uso-tiny").model_copy(update={"cuda_graphs": "on"})
    with pytest.raises(BackendError, match=r'"on" cannot be done here: a CPU has no CUDA graphs; "auto"'):
        USOEngine.from_config(config, device="cpu")
    text = 'name = "x"\ncuda_graphs = "sometimes"\ncuda_graph_mib = 0\n[transformer]\ncheckpoint = "x"\n'
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)cuda_graphs.*cuda_graph_mib"):
        load_config(file)


def test_an_engine_on_a_cpu_says_why_it_has_none() -> None:
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        found = engine.statistics().graphs
    assert (found.mode, found.reason, found.captured) == ("auto", "a CPU has no CUDA graphs", 0)
