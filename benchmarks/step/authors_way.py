"""A denoising step computed the way the authors' code does: the first rungs of the ladder.

One sequence as a batch of one, every operation on its own, LoRA added beside each matrix, and everything that depends on the
request alone (text and content projections, rotary tables, modulation) computed again in every step. Two of these can be
switched off to see what each costs. Work that their modules do twice or in vain is done here, too: a single block with a LoRA
computes GELU and its concatenation once for the matrix and once for the LoRA, and every LoRA's result is multiplied by a
weight of one. Written from what the authors' modules compute; held to our transformer by `tests/test_ladder.py`, to their
operations by `tests/test_benchmark_authors.py`. Their code also runs the SigLIP encoder in every step: the ladder leaves it
out in their favour, and `benchmarks.compare` takes it in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workload import Inputs, LowRank
from uso_engine.model.linear import Linear
from uso_engine.model.modulation import sinusoidal_embedding
from uso_engine.model.rope import content_positions, grid_positions
from uso_engine.model.transformer import Transformer

LORA_WEIGHT = 1
"""Their default, by which they multiply."""


class AuthorsWay:
    """The step.

    Args:
        transformer: the weights: without LoRA if `lora` is given, else with it merged.
        inputs: the request.
        lora: low-rank updates by canonical layer name, added beside the matrices.
        hoist: compute what no step changes once, for the list of all times.
        times: all times of the run; read only if hoisting.
        encode_style: makes the style tokens [L_style, C] in every step; by default they are the request's.
    """

    def __init__(
        self,
        transformer: Transformer,
        inputs: Inputs,
        *,
        lora: dict[str, LowRank] | None = None,
        hoist: bool = False,
        times: tuple[float, ...] = (),
        encode_style: Callable[[], Tensor] | None = None,
    ) -> None:
        self._encode_style = encode_style if encode_style is not None else lambda: inputs.style
        self._model, self._inputs, self._lora = transformer, inputs, lora or {}
        self._params = transformer.params
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._vectors: dict[float, dict[str, Tensor]] = {}
        if hoist:
            self._kept = self._fixed()
            self._vectors = {time: self._modulate(time) for time in times}

    def velocity(self, latents: Tensor, time: float) -> Tensor:
        """One evaluation: [L_img, 64] latents to their velocity."""
        text, content, turn = self._kept if self._kept is not None else self._fixed()
        vectors = self._vectors[time] if self._vectors else self._modulate(time)
        model, length = self._model, text.shape[1]
        image = torch.cat((model.img_in(latents[None]), content), dim=1)
        for i in range(self._params.depth):
            text, image = self._double(f"double_blocks.{i}", text, image, vectors, turn)
        joint = torch.cat((text, image), dim=1)
        for i in range(self._params.depth_single_blocks):
            joint = self._single(f"single_blocks.{i}", joint, vectors, turn)
        image = joint[:, length : length + latents.shape[0]]
        shift, scale = vectors["final_layer"].chunk(2, dim=-1)
        return model.final_layer.linear((1 + scale) * self._norm(image) + shift)[0]

    def _fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Text and content tokens, and the rotation of every token as 2 x 2 matrices."""
        inputs, model = self._inputs, self._model
        text = torch.cat((self._encode_style()[None], model.txt_in(inputs.text[None])), dim=1)
        contents = [model.img_in(content[None]) for content in inputs.contents]
        content = torch.cat(contents, dim=1) if contents else text[:, :0]
        positions = [torch.zeros(text.shape[1], 3), grid_positions(inputs.grid)]
        positions += content_positions(inputs.grid, inputs.content_grids)
        ids = torch.cat(positions).to(text.device, torch.float64)
        rotations = []
        for axis, columns in enumerate(self._params.axes_dim):
            exponents = torch.arange(0, columns, 2, dtype=torch.float64, device=text.device) / columns
            angle = ids[:, axis, None] / self._params.theta**exponents
            matrices = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1)
            rotations.append(matrices.unflatten(-1, (2, 2)).float())
        rotation = torch.cat(rotations, dim=-3)
        return text, content, rotation

    def _modulate(self, time: float) -> dict[str, Tensor]:
        """Every block's modulation vectors, [1, 1, n C]."""
        model, dtype = self._model, self._model.img_in.weight.dtype
        device = model.img_in.weight.device
        vector = model.time_in(sinusoidal_embedding(torch.tensor([time], device=device)).to(dtype))
        if model.guidance_in is not None:
            guidance = torch.tensor([self._inputs.guidance], device=device)
            vector = vector + model.guidance_in(sinusoidal_embedding(guidance).to(dtype))
        vector = vector + model.vector_in(self._inputs.pooled[None])
        vectors = {}
        for name, module in model.named_modules():
            if name.endswith(("img_mod.lin", "txt_mod.lin", "modulation.lin", "adaLN_modulation.1")):
                vectors[name.rpartition(".adaLN")[0] or name.removesuffix(".lin")] = module(F.silu(vector))[:, None]
        return vectors

    def _linear(self, name: str, x: Tensor) -> Tensor:
        layer = self._model.get_submodule(name)
        assert isinstance(layer, Linear)
        return F.linear(x, layer.weight, layer.bias)  # PyTorch's own, whatever the engine's layers make of their product.

    def _update(self, name: str, x: Tensor) -> Tensor:
        """What the LoRA of a matrix adds to its result."""
        down, up = self._lora[name]
        return F.linear(F.linear(x, down), up) * LORA_WEIGHT

    def _adapted(self, name: str, x: Tensor) -> Tensor:
        y = self._linear(name, x)
        return y + self._update(name, x) if name in self._lora else y

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def _heads(self, qkv: Tensor, norms: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, H, L, D], the first two normalised per head."""
        q, k, v = qkv.unflatten(-1, (3, self._params.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scaled = []
        for x, which in ((q, "query_norm"), (k, "key_norm")):
            wide = x.float()
            wide = wide * torch.rsqrt((wide**2).mean(-1, keepdim=True) + 1e-6)
            weight = self._model.get_parameter(f"{norms}.{which}.scale")
            scaled.append((wide * weight.float()).to(x.dtype))
        return scaled[0], scaled[1], v

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, turn: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            pairs = x.float().unflatten(-1, (-1, 1, 2))
            return (turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]).flatten(-2).to(x.dtype)

        return F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2)

    def _double(
        self, name: str, text: Tensor, image: Tensor, vectors: dict[str, Tensor], turn: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts, streams = [], {"txt": text, "img": image}
        for stream, x in streams.items():
            shift, scale, *_ = vectors[f"{name}.{stream}_mod"].chunk(6, dim=-1)
            normed = (1 + scale) * self._norm(x) + shift
            parts.append(self._heads(self._adapted(f"{name}.{stream}_attn.qkv", normed), f"{name}.{stream}_attn.norm"))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        attended = self._attend(q, k, v, turn)
        results = []
        for stream, x, part in zip(streams, streams.values(), attended.tensor_split((text.shape[1],), dim=1), strict=True):
            _, _, gate, shift, scale, mlp_gate = vectors[f"{name}.{stream}_mod"].chunk(6, dim=-1)
            x = x + gate * self._adapted(f"{name}.{stream}_attn.proj", part)
            hidden = self._linear(f"{name}.{stream}_mlp.0", (1 + scale) * self._norm(x) + shift)
            results.append(x + mlp_gate * self._linear(f"{name}.{stream}_mlp.2", F.gelu(hidden, approximate="tanh")))
        return results[0], results[1]

    def _single(self, name: str, x: Tensor, vectors: dict[str, Tensor], turn: Tensor) -> Tensor:
        shift, scale, gate = vectors[f"{name}.modulation"].chunk(3, dim=-1)
        normed = (1 + scale) * self._norm(x) + shift
        projected, width = self._linear(f"{name}.linear1", normed), self._params.hidden_size
        qkv, hidden = projected.split((3 * width, projected.shape[-1] - 3 * width), dim=-1)
        if f"{name}.linear1" in self._lora:
            qkv = qkv + self._update(f"{name}.linear1", normed)
        attended = self._attend(*self._heads(qkv, f"{name}.norm"), turn)
        result = self._linear(f"{name}.linear2", torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1))
        if f"{name}.linear2" in self._lora:
            again = torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1)
            result = result + self._update(f"{name}.linear2", again)
        return x + gate * result
