"""What passes between processes within a step: heads for rows around attention, and results to the first process.

    q, k, v   [rows of my share, H, D]  ->  [rows of all, H / N, D]      attention of my heads over every row      and back

Two all-to-alls a block: each process sends (N - 1) / N of its rows of q, k, v and of attention's result, which is
8 L C (N - 1) / N^2 bytes in bfloat16. Source: DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from uso_kernels.attention import attention
from uso_kernels.ragged import Ragged

from .group import Group
from .shares import Order, Share


class Exchange:
    """The exchanges of one step.

    Args:
        group: the processes.
        share: of the batch, this process's.
    """

    def __init__(self, group: Group, share: Share) -> None:
        self._group, self._share = group, share

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Ragged, backend: str, out: Tensor | None) -> Tensor:
        """Attention of a share's queries to every process's keys.

        Args:
            q: [T_q, H, D], rows of the share in the order of `queries`.
            k: [T, H, D], rows of the share in joint order.
            v: [T, H, D].
            queries: the joint or the output layout of the share's batch.
            backend: of `uso_kernels.attention`.
            out: [T_q, H, D], where the result goes.

        Returns:
            [T_q, H, D].
        """
        order, joint = self._share.order_of(queries), self._share.joint
        if order is joint:
            q_heads, k_heads, v_heads = self._by_heads(torch.stack((q, k, v), 1), joint).unbind(1)
        else:
            (q_heads,) = self._by_heads(q[:, None], order).unbind(1)
            k_heads, v_heads = self._by_heads(torch.stack((k, v), 1), joint).unbind(1)
        keys = self._share.keys
        k_heads, v_heads = keys.take(k_heads), keys.take(v_heads)
        attended = attention(q_heads, k_heads, v_heads, order.whole, keys.layout, backend=backend)
        return self._by_rows(attended, order, out)

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

    def _by_heads(self, x: Tensor, order: Order) -> Tensor:
        """[rows of this share, n, H, D] to [rows of the whole batch, n, H / N, D]: this process's heads."""
        size = self._group.size
        parts = x.unflatten(2, (size, -1)).movedim(2, 0).flatten(0, 1)
        received = self._group.all_to_all(parts, [len(x)] * size, list(order.rows))
        return received.index_select(0, order.from_shares)

    def _by_rows(self, x: Tensor, order: Order, out: Tensor | None) -> Tensor:
        """[rows of the whole batch, H / N, D] to [rows of this share, H, D]: all heads."""
        size, mine = self._group.size, order.rows[self._group.rank]
        received = self._group.all_to_all(x.index_select(0, order.to_shares), list(order.rows), [mine] * size)
        heads = received.unflatten(0, (size, mine)).movedim(0, 1).flatten(1, 2)
        return heads if out is None else out.copy_(heads)
