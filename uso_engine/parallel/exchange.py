"""What passes between processes within a step: heads for rows around attention, and results to the first process.

    q, k, v   [rows of my share, H, D]  ->  [rows of all, H / N, D]      attention of my heads over every row      and back

Two all-to-alls a block: each process sends (N - 1) / N of its rows of q, k, v and of attention's result, which is
8 L C (N - 1) / N^2 bytes in bfloat16. What a block computes between `begin` and the result hides the first of the two.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uso_kernels.attention import attention
from uso_kernels.ragged import Ragged

from .group import Arriving, Group
from .shares import Order, Share


class Exchange:
    """The exchanges of one step.

    Args:
        group: the processes.
        share: of the batch, this process's.
    """

    def __init__(self, group: Group, share: Share) -> None:
        self._group, self._share = group, share

    def begin(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, backend: str) -> Callable[[], Tensor]:
        """Begin attention of a share's queries to every process's keys: send what the others need of them.

        Args:
            q: [T_q, H, D], rows of the share in the order of `queries`.
            k: [T, H, D], rows of the share in joint order.
            v: [T, H, D].
            queries: the joint or the output layout of the share's batch.
            backend: of `uso_kernels.attention`.

        Returns:
            A function that waits for what the others send, attends, and gives [T_q, H, D].
        """
        order, joint, keys = self._share.order_of(queries), self._share.joint, self._share.keys
        if order is joint:
            sent = [(self._begin_by_heads(torch.stack((q, k, v), 1), joint), joint)]
        else:
            sent = [
                (self._begin_by_heads(q[:, None], order), order),
                (self._begin_by_heads(torch.stack((k, v), 1), joint), joint),
            ]

        def finish() -> Tensor:
            q_heads, k_heads, v_heads = (
                heads for arriving, its in sent for heads in arriving.wait().index_select(0, its.from_shares).unbind(1)
            )
            sent.clear()  # Attention may have their memory.
            k_heads, v_heads = keys.take(k_heads), keys.take(v_heads)
            attended = attention(q_heads, k_heads, v_heads, order.whole, keys.layout, backend=backend)
            return self._by_rows(attended, order)

        return finish

    def gather(self, x: Tensor, order: Order) -> Tensor | None:
        """Bring the rows of all shares to the first process.

        Args:
            x: [rows of this share, ...].
            order: of its rows.

        Returns:
            [rows of the whole batch, ...] on the first process, None on the others.
        """
        size, rank = self._group.size, self._group.rank
        sent = [len(x)] + [0] * (size - 1)
        received = self._group.all_to_all(x, sent, list(order.rows) if rank == 0 else [0] * size)
        return received.index_select(0, order.from_shares) if rank == 0 else None

    def _begin_by_heads(self, x: Tensor, order: Order) -> Arriving:
        """[rows of this share, n, H, D] to [rows of all shares, n, H / N, D]: this process's heads."""
        size = self._group.size
        parts = x.unflatten(2, (size, -1)).movedim(2, 0).flatten(0, 1)
        return self._group.begin_all_to_all(parts, [len(x)] * size, list(order.rows))

    def _by_rows(self, x: Tensor, order: Order) -> Tensor:
        """[rows of the whole batch, H / N, D] to [rows of this share, H, D]: all heads."""
        size, mine = self._group.size, order.rows[self._group.rank]
        received = self._group.all_to_all(x.index_select(0, order.to_shares), list(order.rows), [mine] * size)
        return received.unflatten(0, (size, mine)).movedim(0, 1).flatten(1, 2)
