"""Hooks of a transformer's modules: a step calls every layer that has one, and a group that no step calls refuses them."""

from __future__ import annotations

from typing import NoReturn

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def hooks_everywhere() -> bool:
    """Whether hooks on all modules of the process are registered (``torch.nn.modules.module.register_module_forward_hook``)."""
    return bool(_has_any_global_hook())


def is_hooked(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its class's `forward`: then it has to be called, whole, wherever it has a part.

    By a hook of its own, forward or backward, by one on all modules, or by a `forward` that was set on this one object.
    """
    own = layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    return bool(own) or "forward" in vars(layer) or hooks_everywhere()


class LayerGroup(nn.Module):
    """Layers under one name of the checkpoint. Blocks call the layers and never the group, so it takes no hooks.

    Raises:
        ValueError: from every method that registers a hook; the message names the layers to hook into.
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        layers = [name for name, module in self.named_modules() if type(module).forward is not nn.Module.forward]
        instead = f"its layers ({', '.join(layers)})" if layers else "the block, or the projection it follows"
        raise ValueError(f"no step calls {type(self).__name__}, so a hook of it would never run: hook into {instead}")

    register_forward_pre_hook = register_forward_hook = _refuse
    register_full_backward_pre_hook = register_full_backward_hook = register_backward_hook = _refuse
