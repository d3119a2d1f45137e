"""Whether all processes compute with the same weights and the same versions."""

from __future__ import annotations

import hashlib

import torch

from uso_engine.errors import ParallelError
from uso_engine.model.transformer import Transformer
from uso_engine.version import VERSION

from .group import Group

_SAMPLES = 1024
"""Numbers of each tensor that are compared: reading all of 24 GB would take longer than loading them."""


def identity(transformer: Transformer) -> dict[str, str]:
    """What has to agree, by name; "weights" is a digest of all names and shapes and of sampled numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        numbers = tensor.reshape(-1)
        sampled = numbers[:: max(1, numbers.numel() // _SAMPLES)].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sampled.numpy().tobytes())
    return {
        "uso-engine": VERSION,
        "torch": torch.__version__,
        "attention": transformer.attention_backend,
        "weights": digest.hexdigest(),
    }


def check_same(group: Group, transformer: Transformer) -> None:
    """Compare every process's identity with the first one's; all of them take part.

    Raises:
        ParallelError: they differ; says which process and in what. In every process.
    """
    mine = identity(transformer)
    wanted = group.share_object(mine if group.rank == 0 else None)
    wrong = sum(1 << i for i, name in enumerate(sorted(wanted)) if mine.get(name) != wanted[name])
    answer = torch.tensor([[wrong]] * group.size, device=group.device)
    answers = group.all_to_all(answer, [1] * group.size, [1] * group.size).flatten().tolist()
    problems = [
        f"process {rank} has another {name}"
        for rank, bits in enumerate(answers)
        for i, name in enumerate(sorted(wanted))
        if bits >> i & 1
    ]
    if problems:
        raise ParallelError(f"the processes cannot compute together: {'; '.join(problems)}")
