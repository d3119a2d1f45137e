"""diffusers' `FluxTransformer2DModel`: LoRA fused, encoders run once, reference tokens behind the image's.

It has no place for style tokens; a text embedder that puts them before the text's gives it one, as a user's would.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.step.against_diffusers import diffusers_twin
from uso_kernels.attention import attention
from uso_kernels.ragged import Ragged

from .cases import Case
from .evaluations import Evaluations
from .models import Models, encode, noise, png_files, sigmas, weight_bytes

DISPATCH = "diffusers.models.transformers.transformer_flux.dispatch_attention_fn"
GPU_BACKENDS = ("native", "_native_cudnn", "_native_flash")


class StyledEmbedder(nn.Module):
    """diffusers' text embedder with style tokens before what it gives.

    Args:
        embedder: theirs.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self.style: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        """Map [n, L_txt, context_in_dim] to [n, L_style + L_txt, C]."""
        embedded: Tensor = self.embedder(text)
        return embedded if self.style is None else torch.cat((self.style[None].expand(len(text), -1, -1), embedded), dim=1)


class DiffusersWay:
    """Whole requests.

    Args:
        models: the shared ones.
        evaluations: to stand around its transformer.
        largest_difference: of its first velocity.
        compiled: whether its repeated blocks are compiled.
        prepare: changes the transformer first, such as quantising it.
        suffix: of its name.
    """

    def __init__(
        self,
        models: Models,
        evaluations: Evaluations,
        *,
        largest_difference: float,
        compiled: bool = False,
        prepare: Callable[[nn.Module], object] | None = None,
        suffix: str = "",
    ) -> None:
        self.name = f"diffusers{suffix}{', compiled' if compiled else ''}"
        self._models, self.evaluations, self.largest_difference = models, evaluations, largest_difference
        evaluations.counts_flops = not compiled and prepare is None
        self._twin: Any = diffusers_twin(models.merged)
        if prepare is not None:
            prepare(self._twin)
        if compiled:
            self._twin.compile_repeated_blocks(fullgraph=True)
        self._embedder = StyledEmbedder(self._twin.context_embedder)
        self._twin.context_embedder = self._embedder
        evaluations.watch(self._twin)
        self.weights = weight_bytes(self._twin)
        self._on_cpu = models.device.type == "cpu"
        self.settings: dict[str, object] = {"LoRA": "fused", "compile_repeated_blocks": compiled}
        self.settings["attention"] = "the engine's" if self._on_cpu and not compiled else "scaled_dot_product_attention"

    def choose_attention(self, case: Case) -> None:
        """On a GPU, take the backend whose step is fastest here."""
        if self._on_cpu:
            return
        milliseconds: dict[str, float] = {}
        for backend in GPU_BACKENDS:
            self._twin.set_attention_backend(backend)
            self.request(case, 1)
            self.evaluations.reset()
            self.request(case, 1)
            milliseconds[backend] = min(self.evaluations.milliseconds())
        best = min(milliseconds, key=lambda name: milliseconds[name])
        self._twin.set_attention_backend(best)
        self.settings |= {"attention": best, "attention ms a step": milliseconds}

    @torch.no_grad()
    def request(self, case: Case, seed: int) -> list[bytes]:
        models, encoded = self._models, encode(self._models, case, seed)
        styles = [models.style.encode(pixels).tokens for pixels in encoded.style_pixels]
        self._embedder.style = torch.cat(styles) if styles else None
        latents = torch.stack([noise(models, case, seed + i) for i in range(case.images)])
        text = encoded.text.tokens.expand(case.images, -1, -1)
        rows = len(encoded.text.tokens) + (0 if self._embedder.style is None else len(self._embedder.style))
        fixed = {
            "encoder_hidden_states": text,
            "pooled_projections": encoded.text.pooled.expand(case.images, -1),
            "guidance": torch.full((case.images,), models.size.guidance, device=models.device),
            "img_ids": encoded.positions.to(models.device),
            "txt_ids": torch.zeros(rows, 3, device=models.device),
        }
        contents = [content.expand(case.images, -1, -1) for content in encoded.contents]
        for time, following in pairwise(sigmas(models, case)):
            timestep = torch.full((case.images,), time, device=models.device, dtype=models.dtype)
            velocity = self._evaluate(torch.cat((latents, *contents), dim=1), timestep, fixed)[:, : latents.shape[1]]
            latents = latents + (following - time) * velocity
        return png_files(models, latents, encoded.grid)

    def _evaluate(self, hidden: Tensor, timestep: Tensor, fixed: dict[str, Tensor]) -> Tensor:
        arguments = {"hidden_states": hidden, "timestep": timestep, **fixed}
        if self.settings["attention"] != "the engine's":
            velocity: Tensor = self._twin(**arguments, return_dict=False)[0]
            return velocity
        with patch(DISPATCH, _engines_attention):
            own: Tensor = self._twin(**arguments, return_dict=False)[0]
        return own

    def velocity(self, output: Tensor, case: Case) -> Tensor:
        return output[0, : self._models.size.tokens(case).image]

    def close(self) -> None:
        """Nothing is its own but its module."""


def _engines_attention(query: Tensor, key: Tensor, value: Tensor, **others: object) -> Tensor:
    """[n, L, H, D] each, by the backend that the engine takes on this device."""
    layout = Ragged.pack([query.shape[1]] * len(query), query.device)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return attention(q, k, v, layout, layout).unflatten(0, (len(query), -1))
