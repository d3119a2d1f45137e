"""The other processes: each waits for the first one's message, and computes its share."""

from __future__ import annotations

import torch

from uso_engine.model.packing import PackedBatch
from uso_engine.weights.loaded import LoadedTransformer

from .group import Group
from .identity import check_same
from .messages import End, LoRAMessage, Message
from .step import SharedRun, StepMessage, evaluate, receive_batch


@torch.no_grad()
def follow(group: Group, loaded: LoadedTransformer) -> None:
    """Take part until the first process ends.

    Args:
        group: joined; this is not its first process.
        loaded: the transformer, with the configured LoRAs.

    Raises:
        ParallelError: weights or versions are not the first process's, or a process is gone.
    """
    try:
        check_same(group, loaded.module)
        _serve(group, loaded)
    except BaseException:
        group.abort()  # Nobody is to wait for this process.
        raise
    group.close()


def _serve(group: Group, loaded: LoadedTransformer) -> None:
    known: dict[int, SharedRun] = {}
    while True:
        message: Message = group.share_object(None)
        match message:
            case End():
                return
            case LoRAMessage():
                loaded.set_loras(message.loras, keep_configured=message.keep_configured)
            case StepMessage():
                _take_part(group, loaded, message, known)


def _take_part(group: Group, loaded: LoadedTransformer, message: StepMessage, known: dict[int, SharedRun]) -> None:
    for number in known.keys() - message.alive:
        del known[number]
    if message.batch is not None:
        batch: PackedBatch = receive_batch(group, message.batch)
        known[message.number] = SharedRun.begin(loaded.module, group, batch)
    shared = known[message.number]
    weight = loaded.module.img_in.weight
    latents = weight.new_empty(shared.share.output.whole.rows, loaded.module.params.in_channels)
    modulation = weight.new_empty(message.modulation_shape)
    group.share(latents)
    group.share(modulation)
    evaluate(loaded.module, group, shared, latents, modulation, observer=None, observed=message.observed)
