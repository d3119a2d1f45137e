"""Muon for matrices and convolution kernels: momentum whose singular values are all brought near one before it is applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn


def orthogonalize(gradient: Tensor, steps: int = 5) -> Tensor:
    """Brings the singular values of a matrix near one by a Newton-Schulz iteration in bfloat16.

    Args:
        gradient: [n, m].
        steps: iterations.

    Returns:
        [n, m] in the gradient's dtype.

    Source: Muon (Jordan and others, 2024), with its quintic coefficients.
    """
    x = gradient.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return (x.mT if tall else x).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on parameters of two and more axes, AdamW on the rest.

    Args:
        groups: parameter groups; a group with ``adam=True`` is trained by AdamW, whatever its shapes.
        lr: learning rate, of AdamW's size: an orthogonal update is scaled to the mean square of an AdamW update.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: decoupled, for Muon's parameters only.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "adam": False}
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Applies one update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["adam"] or parameter.ndim < 2:
                    self._adam(parameter, group)
                else:
                    self._muon(parameter, group)

    def _muon(self, parameter: nn.Parameter, group: dict[str, object]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        rate, momentum = float(group["lr"]), float(group["momentum"])  # type: ignore[arg-type]
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        ahead = parameter.grad.lerp(state["momentum"], momentum)
        update = orthogonalize(ahead.flatten(1)).view_as(parameter)
        scale = 0.2 * max(parameter.shape[0], parameter[0].numel()) ** 0.5
        parameter.mul_(1 - rate * float(group["weight_decay"])).add_(update, alpha=-rate * scale)  # type: ignore[arg-type]

    def _adam(self, parameter: nn.Parameter, group: dict[str, object]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = cast(tuple[float, float], group["betas"])
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        square = state["square"] / (1 - second ** state["step"])
        parameter.addcdiv_(mean, square.sqrt() + 1e-8, value=-float(group["lr"]))  # type: ignore[arg-type]
