"""A group of processes in threads of this one: each with a module and channels of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from uso_engine.model.transformer import Transformer
from uso_engine.parallel.follower import follow
from uso_engine.parallel.group import Group, connect_store, serve_store
from uso_engine.parallel.leader import Leader
from uso_engine.weights.loaded import LoadedFloatTransformer, Originals

CPU = torch.device("cpu")


@dataclass
class Threads:
    """The first process's leader, and what became of the others."""

    leader: Leader
    transformer: Transformer
    errors: dict[int, BaseException]


def _no_originals() -> Originals:
    raise AssertionError("these transformers have no LoRAs to change")


@contextmanager
def in_threads(size: int, make: Callable[[int], Transformer], *, step_timeout_s: float = 60) -> Iterator[Threads]:
    """Let so many threads be the processes of a group; the first is this one, and its transformer computes with the others.

    Args:
        size: processes.
        make: makes the transformer of a rank.
        step_timeout_s: of the group.
    """
    store = serve_store(size)
    errors: dict[int, BaseException] = {}
    transformers = [make(rank) for rank in range(size)]

    def run(rank: int) -> None:
        try:
            group = Group(connect_store(store.port, size), rank, size, CPU, step_timeout_s)
            follow(group, LoadedFloatTransformer(transformers[rank], "float32", _no_originals))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"process {rank}") for rank in range(1, size)]
    for thread in threads:
        thread.start()

    def end_others() -> str:
        for thread in threads:
            thread.join(30)
        return "; ".join(f"process {rank}: {error}" for rank, error in sorted(errors.items()))

    leader = Leader(Group(store, 0, size, CPU, step_timeout_s), end_others)
    transformers[0].together = leader
    try:
        leader.check_same(transformers[0])
        yield Threads(leader, transformers[0], errors)
    finally:
        leader.close()
        transformers[0].together = None
        assert not any(thread.is_alive() for thread in threads)
