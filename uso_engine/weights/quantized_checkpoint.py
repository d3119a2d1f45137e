"""Quantised transformers on disk: what made them, saving while quantising, loading without the originals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.precision.quantized_linear import TensorLayout
from uso_engine.precision.tiers import QUANTIZED_TIERS, Format, TierName
from uso_engine.precision.transformer import quantized_transformer

from .files.key_report import bulleted, compare_shapes, short_reason, summarise_keys
from .files.quantized_file import Document, QuantizedFile, write_quantized_file
from .files.recorded_file import RecordedFile
from .files.tensor_source import TensorSource
from .loading import Progress
from .lora import LoRASet, read_lora
from .model_sizes import read_sizes
from .quantizing import put, quantized_tensors
from .transformer_checkpoint import open_transformer_checkpoint

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Description:
    """What a quantised file says about itself.

    Args:
        tier: its precision tier.
        params: the transformer's sizes.
        formats: of every matrix, "kinds" in the file.
        dtype: of what stays in floating point.
        source: the base checkpoint.
        loras: merged into it, in this order.
    """

    tier: TierName
    params: TransformerParams
    formats: Mapping[str, Format]
    dtype: torch.dtype
    source: RecordedFile
    loras: tuple[RecordedFile, ...]

    def document(self) -> Document:
        """As plain JSON."""
        return {
            "version": FORMAT_VERSION,
            "tier": self.tier,
            "params": asdict(self.params),
            "kinds": dict(self.formats),
            "dtype": str(self.dtype).removeprefix("torch."),
            "source": asdict(self.source),
            "loras": [asdict(entry) for entry in self.loras],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], path: Path) -> Description:
        """Understand a file's JSON.

        Raises:
            CheckpointError: another version of the format, or formats that this engine does not know.
        """
        if document.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: version {document.get('version')!r} of the quantised format, this engine reads {FORMAT_VERSION}"
            )
        try:
            return cls._understood(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: its description cannot be understood: {short_reason(error)}") from error

    @classmethod
    def _understood(cls, document: Mapping[str, Any]) -> Description:
        unknown = sorted(set(document["kinds"].values()) - set(get_args(Format)))
        if unknown:
            raise ValueError(f"layers of kinds that this engine does not know: {summarise_keys(unknown)}")
        if document["tier"] not in QUANTIZED_TIERS or not isinstance(getattr(torch, document["dtype"]), torch.dtype):
            raise ValueError(f"tier {document['tier']} in {document['dtype']} is not known")
        return cls(
            tier=document["tier"],
            params=read_sizes(TransformerParams, document["params"]),
            formats=document["kinds"],
            dtype=getattr(torch, document["dtype"]),
            source=RecordedFile(**document["source"]),
            loras=tuple(RecordedFile(**entry) for entry in document["loras"]),
        )

    def layout(self) -> dict[str, TensorLayout]:
        """Type and shape of every tensor of such a transformer."""
        state = quantized_transformer(self.params, self.formats, dtype=self.dtype).state_dict()
        return {key: TensorLayout(tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}

    def require(
        self,
        *,
        params: TransformerParams,
        tier: str,
        loras: Sequence[tuple[Path, float]],
        formats: Mapping[str, Format],
        path: Path,
    ) -> None:
        """Check that the file is what a configuration asks for.

        Args:
            params: the configuration's transformer sizes.
            tier: its precision tier.
            loras: its LoRA files and weights, in order. Where a file is there its content is compared, else its name.
            formats: what its tier and keep-list make of every matrix.
            path: of the quantised file, for the message.

        Raises:
            CheckpointError: it is something else; every difference is listed.
        """
        problems = [
            f"{field.name} is {getattr(self.params, field.name)}, the configuration has {getattr(params, field.name)}"
            for field in fields(TransformerParams)
            if getattr(self.params, field.name) != getattr(params, field.name)
        ]
        if self.tier != tier:
            problems.append(f"precision tier is {self.tier}, the configuration has {tier}")
        elif self.params == params:
            other = [name for name, chosen in formats.items() if self.formats.get(name) != chosen]
            if other:
                problems.append(f"other layers are kept than the configuration's precision says: {summarise_keys(other)}")
        if [entry.weight for entry in self.loras] != [weight for _, weight in loras] or not all(
            entry.is_same(file) for entry, (file, _) in zip(self.loras, loras, strict=True)
        ):
            merged = ", ".join(map(str, self.loras)) or "none"
            wanted = ", ".join(f"{file} at weight {weight:g}" for file, weight in loras) or "none"
            problems.append(f"merged LoRAs are {merged}; the configuration has {wanted}")
        if problems:
            raise CheckpointError(bulleted(f"{path} is not what the configuration asks for", problems))


def save_quantized(
    path: Path, description: Description, source: TensorSource, loras: LoRASet, *, progress: Progress | None = None
) -> None:
    """Quantise into a file; one layer at a time is in memory, never the model.

    Args:
        path: of the file.
        description: what to make; its `source` and `loras` record where `source` and `loras` were read from.
        source: the pristine weights.
        loras: merged before quantising.
        progress: told the bytes read and the bytes to read.

    Raises:
        CheckpointError, LoRAError: weights that do not fit or are not finite; nothing is left behind.
        OutputError: the file cannot be written; nothing is left behind.
    """
    tensors = quantized_tensors(
        description.params, source, description.formats, dtype=description.dtype, loras=loras, progress=progress
    )
    write_quantized_file(path, description.layout(), tensors, description.document())


def read_description(path: Path) -> Description:
    """What a quantised file says about itself, without reading its tensors; errors as for `load_quantized`."""
    return Description.from_document(QuantizedFile(path).document, path)


def load_quantized(
    path: Path, *, device: torch.device | str = "cpu", check_contents: bool = True
) -> tuple[Transformer, Description]:
    """Load a quantised transformer without its originals.

    Args:
        path: of a file that `save_quantized` wrote.
        device: where to; on the CPU tensors stay mapped from the file.
        check_contents: compare every tensor with its hash (seconds for 9 GB); the header is always checked.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: truncated, edited, of another version, or not a quantised transformer.
    """
    file = QuantizedFile(path)
    description = Description.from_document(file.document, path)
    expected, found = description.layout(), file.layout
    problems = compare_shapes(
        {key: layout.shape for key, layout in expected.items()}, {key: layout.shape for key, layout in found.items()}
    )
    problems += [
        f"{key} is {found[key].dtype}, expected {layout.dtype}"
        for key, layout in expected.items()
        if key in found and found[key].dtype != layout.dtype
    ]
    if problems:
        raise CheckpointError(bulleted(f"{path} contradicts its own description", problems))
    if check_contents:
        file.check_contents()
    module = quantized_transformer(description.params, description.formats, dtype=description.dtype)
    for key in expected:
        put(module, key, file.tensor(key).to(device))
    return module, description


def open_originals(description: Description, *, folder: Path | None = None) -> tuple[TensorSource, LoRASet]:
    """Open what a quantised file was made from, to quantise it again with other LoRAs.

    Args:
        description: of the file.
        folder: another place to look for the files, by name.

    Raises:
        MissingFileError: originals that are not there; all are named.
        CheckpointError: originals that are not the same any more; all are named.
    """
    records = (description.source, *description.loras)
    found = [record.locate(folder) for record in records]
    missing = [str(record) for record, path in zip(records, found, strict=True) if path is None]
    if missing:
        raise MissingFileError(
            bulleted("other LoRAs need the weights that the quantised file was made from; these are not there", missing)
        )
    paths = [path for path in found if path is not None]
    changed = [str(record) for record, path in zip(records, paths, strict=True) if not record.is_same(path)]
    if changed:
        raise CheckpointError(bulleted("the quantised file was made from other content than these files have now", changed))
    loras = [
        (read_lora(path, description.params), float(record.weight if record.weight is not None else 1.0))
        for record, path in zip(records[1:], paths[1:], strict=True)
    ]
    return open_transformer_checkpoint(paths[0], description.params), loras
