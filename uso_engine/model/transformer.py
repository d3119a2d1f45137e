"""The FLUX transformer with USO's token order, on a packed batch.

Split in what depends on a step (`forward`) and what does not (`embed_text`, `embed_latents` of content images,
`modulation_table`). Parameter names are the checkpoint's. Source: FLUX.1 by Black Forest Labs; ByteDance USO
``uso/flux/model.py`` for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from uso_kernels.attention import dense_preference, resolve_backends
from uso_kernels.ragged import Ragged
from uso_kernels.whole_vectors import silu

from .blocks import DoubleBlock, SingleBlock
from .hooks import LayerGroup
from .linear import Linear
from .modulation import DOUBLE_VECTORS, FINAL_VECTORS, SINGLE_VECTORS, Embedder, sinusoidal_embedding
from .packing import PackedBatch
from .params import TransformerParams
from .residual import NextNorm, begin
from .run import ALL_FUSED, Exchange, Fusion, Run
from .side_stream import SideStream

Observer = Callable[[str, Tensor, Ragged], None]
"""Called with a name (``double.0.img``, ``double.0.txt``, ``single.0``, ``velocity``), a packed tensor and its layout."""


class Together(Protocol):
    """Other processes that compute with this one; `uso_engine.parallel.leader` is the real one."""

    def evaluate(
        self, transformer: Transformer, batch: PackedBatch, latents: Tensor, modulation: Tensor, observer: Observer | None
    ) -> Tensor:
        """As `Transformer.forward`."""


class FinalModulation(nn.Module):
    """The final layer's modulation linear under its checkpoint name (index 0 there is a SiLU)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.add_module("1", Linear(hidden_size, FINAL_VECTORS * hidden_size))

    def forward(self, activated: Tensor) -> Tensor:
        """Map SiLU of the conditioning vectors, [N, C], to [N, 2, C]."""
        vectors: Tensor = self.get_submodule("1")(activated)
        return vectors.unflatten(-1, (FINAL_VECTORS, -1))


class FinalLayer(LayerGroup):
    """The projection back to latent channels and its modulation."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.linear = Linear(params.hidden_size, params.in_channels)
        self.adaLN_modulation = FinalModulation(params.hidden_size)


class Transformer(nn.Module):
    """The model. Build it under ``torch.device("meta")`` and load values with `uso_engine.weights`.

    Args:
        params: its sizes.
        fusion: which passes over the data are left out.
    """

    def __init__(self, params: TransformerParams, *, fusion: Fusion = ALL_FUSED) -> None:
        super().__init__()
        self.params = params
        self.fusion = fusion
        self.attention_backend = "auto"
        """A backend of `uso_kernels.attention` for every block, or "auto": the default of each sequence."""
        self.together: Together | None = None
        """The other processes that have a share of every step; None where all is computed here."""
        self.beside: SideStream | None = None
        """The stream for what the text stream does by itself, beside the image stream; None: one after the other."""
        width = params.hidden_size
        self.img_in = Linear(params.in_channels, width)
        self.time_in = Embedder(256, width)
        self.vector_in = Embedder(params.vec_in_dim, width)
        self.guidance_in = Embedder(256, width) if params.guidance_embed else None
        self.txt_in = Linear(params.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = FinalLayer(params)

    @property
    def modulation_vectors(self) -> int:
        """Rows of C numbers in the modulation table per step."""
        return DOUBLE_VECTORS * self.params.depth + SINGLE_VECTORS * self.params.depth_single_blocks + FINAL_VECTORS

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Project T5 tokens [L, context_in_dim] to [L, C]."""
        return self.txt_in(tokens)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Project packed latents [L, in_channels] to [L, C]."""
        return self.img_in(latents)

    def modulation_table(self, times: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        """Compute all modulation vectors of all steps.

        Args:
            times: [steps], between 1 and 0. Kept in the dtype given until after the sinusoidal embedding.
            guidance: [steps]; read only if the model has a guidance embedding.
            pooled: [vec_in_dim], pooled CLIP embedding.

        Returns:
            [steps, vectors, C] in the weights' dtype, see `uso_engine.model.modulation` for the order.
        """
        dtype = self.img_in.weight.dtype
        vector = self.time_in(sinusoidal_embedding(times).to(dtype))
        if self.guidance_in is not None:
            vector = vector + self.guidance_in(sinusoidal_embedding(guidance).to(dtype))
        activated = silu(vector + self.vector_in(pooled.to(dtype)[None]))
        table = activated.new_empty(len(times), self.modulation_vectors, self.params.hidden_size)
        row = 0
        for block in (*self.double_blocks, *self.single_blocks):
            vectors = block.modulation_vectors(activated)
            table[:, row : row + vectors.shape[1]] = vectors
            row += vectors.shape[1]
        table[:, row:] = self.final_layer.adaLN_modulation(activated)
        return table

    def attention_backends(self, batch: PackedBatch) -> tuple[str, ...]:
        """The attention backends that compute a batch: one, or two if some of its sequences are long and others short.

        Raises:
            BackendUnavailable: the one asked for cannot run here.
        """
        layouts = (batch.joint, batch.output)
        chosen = [resolve_backends(self.attention_backend, batch.text_tokens, layout, batch.keys.layout) for layout in layouts]
        return tuple(dict.fromkeys(name for names in chosen for name in names))

    def run_of(self, batch: PackedBatch, exchange: Exchange | None = None) -> Run:
        """Evaluations of a batch one after another, which `forward` takes in its place: what they share is then made once.

        Args:
            batch: the sequences.
            exchange: where this process has a share of the rows only: how attention reaches the others.
        """
        return Run(batch, self.attention_backend, self.fusion, exchange, beside=self.beside)

    def current(self, run: Run) -> Run:
        """The run, or one of the same batch where the ways to compute were chosen otherwise after it was formed."""
        if (run.attention, run.fusion, run.beside) == (self.attention_backend, self.fusion, self.beside):
            return run
        return self.run_of(run.batch, run.exchange)

    def forward(
        self, batch: PackedBatch | Run, latents: Tensor, modulation: Tensor, observer: Observer | None = None
    ) -> Tensor:
        """Predict the velocity of every image in a packed batch.

        Args:
            batch: the sequences, or a `run_of` them.
            latents: [T_out, in_channels], packed latents in output order, the weights' dtype.
            modulation: [S, vectors, C], each sequence's row of its modulation table for this step.
            observer: sees intermediate tensors, which nothing overwrites later.

        Returns:
            [T_out, in_channels], velocity in output order. Where autograd records, its last bits are others than where nothing
            asks for a gradient (docs/faithfulness.md).
        """
        run = batch if isinstance(batch, Run) else self.run_of(batch)
        if run.repeat is not None:
            return run.repeat(latents, modulation)
        run = self.current(run)
        if self.together is not None and run.exchange is None:
            return self.together.evaluate(self, run.batch, latents, modulation, observer)
        run.begin(latents, modulation)
        used = nullcontext() if run.beside is None else run.beside.used()
        with used, dense_preference(latents.device):  # Once for all blocks.
            return self._velocity(run, latents, modulation, observer)

    def _velocity(self, run: Run, latents: Tensor, modulation: Tensor, observer: Observer | None) -> Tensor:
        batch = run.batch
        plan = run.vectors(modulation, self._plan)
        joint = begin(self._double_stream(latents, plan, run, observer), plan.single_norms[0], batch.joint.tile_sequence)
        singles = _blocks(self.single_blocks, SingleBlock)
        for i, block in enumerate(singles[:-1]):
            joint = block(joint, plan.single[i], run, plan.single_norms[i + 1])
            if observer is not None:
                observer(f"single.{i}", joint.x, batch.joint)
        output = singles[-1](joint, plan.single[-1], run, plan.last_norm, is_last=True)
        velocity: Tensor = self.final_layer.linear(output.normed, batch.output)
        if observer is not None:
            observer(f"single.{len(singles) - 1}", output.x, batch.output)
            observer("velocity", velocity, batch.output)
        return velocity

    def _double_stream(self, latents: Tensor, plan: _Vectors, run: Run, observer: Observer | None) -> Tensor:
        """The residual in joint order [T, C] after all double blocks."""
        batch, norms = run.batch, plan.double_norms
        text_norm, image_norm = norms[0]
        text = begin(batch.text_tokens, text_norm, batch.text.tile_sequence)
        image = begin(batch.image_stream(self.img_in(latents, batch.output)), image_norm, batch.image.tile_sequence)
        for i, block in enumerate(_blocks(self.double_blocks, DoubleBlock)):
            text, image = block(text, image, plan.double[i], run, norms[i + 1] if i + 1 < len(norms) else None)
            if observer is not None:
                observer(f"double.{i}.txt", text.x, batch.text)
                observer(f"double.{i}.img", image.x, batch.image)
        return batch.merge(text.x, image.x)

    def _plan(self, modulation: Tensor) -> _Vectors:
        """What each block reads of [S, vectors, C], as views [S, C], and the norm before it."""
        rows, doubles = modulation.unbind(1), DOUBLE_VECTORS * self.params.depth
        double = [rows[i : i + DOUBLE_VECTORS] for i in range(0, doubles, DOUBLE_VECTORS)]
        single = [rows[i : i + SINGLE_VECTORS] for i in range(doubles, len(rows) - FINAL_VECTORS, SINGLE_VECTORS)]
        blocks = _blocks(self.double_blocks, DoubleBlock), _blocks(self.single_blocks, SingleBlock)
        double_norms = [block.first_norms(vectors) for block, vectors in zip(blocks[0], double, strict=True)]
        single_norms = [block.first_norm(vectors) for block, vectors in zip(blocks[1], single, strict=True)]
        # The last block computes fewer rows than it is given and takes floats, to pick them.
        single_norms[-1] = single_norms[-1]._replace(dtype=None)
        return _Vectors(double, single, double_norms, single_norms, NextNorm(rows[-2], rows[-1], self.final_layer.linear.takes))


class _Vectors(NamedTuple):
    """A step's modulation by block: the vectors [S, C] of each, and the norms before them and before the final layer."""

    double: list[tuple[Tensor, ...]]
    single: list[tuple[Tensor, ...]]
    double_norms: list[tuple[NextNorm, NextNorm]]
    single_norms: list[NextNorm]
    last_norm: NextNorm


Block = TypeVar("Block", DoubleBlock, SingleBlock)


def _blocks(modules: nn.ModuleList, kind: type[Block]) -> list[Block]:
    """The blocks of a list, typed."""
    return [module for module in modules if isinstance(module, kind)]
