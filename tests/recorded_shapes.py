"""The shapes of every operation whose sums a library may order by its operands' shapes: products, attention, convolutions.

Two runs whose recorded shapes are the same hand a library the same work, on every machine.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Not layer norms and softmax, which sum each row by itself, nor `_int_mm`: sums of integers are exact in any order.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "_addmm_activation", "_linear_pointwise")
OTHERS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math",
    "convolution",
    "native_group_norm",
)

Operands = tuple[tuple[int, ...], ...]


class Shapes(TorchDispatchMode):
    """Counts every (operation, shapes of its operands)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[str, Operands]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name in PRODUCTS or name in OTHERS:
            self.found[name, tuple(tuple(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor))] += 1
        return function(*args, **(kwargs or {}))

    def matrix_products(self) -> list[Operands]:
        """Operands' shapes of every matrix product."""
        return [shapes for (name, shapes), count in self.found.items() if name in PRODUCTS for _ in range(count)]
