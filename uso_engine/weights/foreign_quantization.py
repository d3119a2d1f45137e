"""Recognising weights that another tool has quantised, by the keys that it stores beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TRACES = (
    (
        "the checkpoint is quantised by bitsandbytes; use the unquantised one",
        re.compile(r"\.quant_state\b|(?:^|\.)(?:absmax|SCB)$"),
    ),
    (
        "the checkpoint is in fp8 with separate scales; use one in bfloat16, or in plain fp8",
        re.compile(r"(?:^|\.)(?:scale_weight|weight_scale|weight_scale_inv|scale_input|input_scale|scaled_fp8|comfy_quant)$"),
    ),
    ("the checkpoint is quantised by nunchaku; use the unquantised one", re.compile(r"\.(?:wscales|smooth_factor)$")),
    ("the checkpoint is quantised by GPTQ or AWQ; use the unquantised one", re.compile(r"\.(?:qzeros|g_idx)$")),
    ("the checkpoint is quantised by optimum-quanto; use the unquantised one", re.compile(r"\.weight\._(?:data|scale)$")),
)


def foreign_quantization(keys: Iterable[str]) -> list[str]:
    """One sentence for each tool whose traces are among the keys; empty if there are none."""
    listed = list(keys)
    return [sentence for sentence, trace in _TRACES if any(trace.search(key) for key in listed)]
