"""Recognising weights that another tool has quantised in a way that is not read, by the keys that it stores beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_INSTEAD = "use a file in bfloat16, fp8 or GGUF, which [precision] tier can quantise again"

_TRACES = (
    ("bitsandbytes (nf4, int8)", re.compile(r"\.quant_state\b|(?:^|\.)(?:absmax|quant_map|nested_absmax|SCB)$")),
    ("nunchaku (SVDQuant)", re.compile(r"\.(?:wscales|ascales|smooth_factor(?:_orig)?|proj_down|lora_down)$|\.wtscale$")),
    ("GPTQ or AWQ", re.compile(r"\.(?:qzeros|g_idx)$")),
    ("torchao", re.compile(r"\.weight(?:\.tensor_impl\b|[:_.]qdata$)|_weight_qdata$")),
    ("optimum-quanto in 4 or 2 bits", re.compile(r"\.weight\.(?:_shift|_data\._data|_zeropoint)$")),
    ("nvfp4", re.compile(r"\.weight_scale_2$")),
    ("fp8 in blocks (weight_scale_inv)", re.compile(r"\.weight_scale_inv$")),
)
_SCALED = (
    (
        "fp8 with separate scales",
        re.compile(r"(?:^|\.)(?:scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant)$"),
    ),
    ("optimum-quanto", re.compile(r"\.weight\._(?:data|scale)$")),
)


def foreign_quantization(keys: Iterable[str], *, reads_scales: bool = False) -> list[str]:
    """One sentence for each tool whose traces are among the keys; empty if there are none.

    Args:
        keys: of a checkpoint.
        reads_scales: whether the caller can read 8-bit weights with scales, see `with_scales`.
    """
    listed = list(keys)
    traces = _TRACES if reads_scales else (*_TRACES, *_SCALED)
    found = [tool for tool, trace in traces if any(trace.search(key) for key in listed)]
    return [f"the checkpoint is quantised as {tool}; {_INSTEAD}" for tool in found]
