"""What the engine hands back in Python: pictures and how they came about."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from uso_engine.imaging.encode import CONTENT_TYPES, Encoder, ImageMetadata, OutputFormat, output_format_of
from uso_engine.imaging.store import ImageStore
from uso_engine.local_names import written_path

from .fields import checked_switch
from .messages import shown
from .response import DataObject, GenerationResponse, ImageObject, Meta, Timings, Usage

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationResult:
    """One request's images.

    Args:
        images: RGB, one per seed; black where the safety checker objected.
        seed: the request's seed, or the one that was drawn.
        seeds: the seed of each image, ``seed + j``; after the last legal seed comes 1.
        has_nsfw_concepts: whether the safety checker objected, for each image.
        prompt: as it was given.
        width: of each image, in pixels.
        height: of each image, in pixels.
        timings: seconds for each stage, in order; they add up to the whole.
        tokens_used: transformer tokens, summed over steps.
        parameters: what made the images, plain JSON; see `uso_engine.provenance`.
        output_format: what the request asked for.
        sync_mode: whether the request asked for the images themselves in the response.
        model: name of the model, for the files' metadata.
        attention: the attention backends that computed it.
        warnings: what a caller should know, such as where the prompt was cut.
        latents: [n, 16, h / 8, w / 8] float32, the last latents; withheld where the safety checker objected to any image.

    Raises:
        ValueError: not one seed and one flag for each image.
    """

    images: tuple[Image.Image, ...]
    seed: int
    seeds: tuple[int, ...]
    has_nsfw_concepts: tuple[bool, ...]
    prompt: str
    width: int
    height: int
    timings: Mapping[str, float]
    tokens_used: int
    parameters: Mapping[str, object] = field(repr=False)
    output_format: OutputFormat = "png"
    sync_mode: bool = False
    model: str = "bytedance/uso"
    attention: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    latents: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.seeds) == len(self.has_nsfw_concepts):
            raise ValueError(
                "expected one seed and one flag for each image, got "
                f"{len(self.images)} images, {len(self.seeds)} seeds, {len(self.has_nsfw_concepts)} flags"
            )

    def save(self, path: str | Path, *, parameters: bool = False, encoder: Encoder | None = None) -> list[Path]:
        """Write the images, each whole or not at all; one that cannot be written does not cost the others.

        Args:
            path: where to, also with ``~``; its ending (.png, .jpg, .jpeg, .webp) decides the format. Several images get
                ``-0``, ``-1`` … before it.
            parameters: whether the files say what made them (prompt, seed …); that they are generated they always say.
            encoder: threads to encode in; some of its own by default.

        Returns:
            The paths, in the order of the images.

        Raises:
            ValueError: another ending, or something that is no path.
            OutputError: an image could not be written; the others were.
        """
        path, parameters = written_path("path", path), checked_switch("parameters", parameters)
        output_format_of(path)
        if encoder is None:
            with Encoder() as own:
                return self.save(path, parameters=parameters, encoder=own)
        several = len(self.images) > 1
        names = [path.with_name(f"{path.stem}-{j}{path.suffix}") if several else path for j in range(len(self.images))]
        pending = [
            encoder.save(image, name, self._metadata(j, parameters))
            for j, (image, name) in enumerate(zip(self.images, names, strict=True))
        ]
        return _all_results(pending)

    def to_response(
        self,
        store: ImageStore | None = None,
        *,
        sync_mode: bool | None = None,
        output_format: OutputFormat | None = None,
        parameters: bool = False,
        encoder: Encoder | None = None,
    ) -> GenerationResponse:
        """The hosted API's response.

        Args:
            store: takes the images and gives their URLs; not needed in sync mode.
            sync_mode: whether the response holds the images (data URI and base64) instead of URLs; as the request asked by
                default.
            output_format: how they are encoded; as the request asked by default.
            parameters: whether the files say what made them.
            encoder: threads to encode in; some of its own by default.

        Returns:
            The response.

        Raises:
            ValueError: no store, and not in sync mode; or a value of another type.
            OutputError: the store could not keep an image.
        """
        sync_mode = self.sync_mode if sync_mode is None else checked_switch("sync_mode", sync_mode)
        parameters = checked_switch("parameters", parameters)
        if store is not None and not callable(getattr(store, "put", None)):
            raise ValueError(f"store must have a method put, as FileStore has, got {shown(store)}")
        if store is None and not sync_mode:
            raise ValueError("URLs need a store to put the images in; give one, or set sync_mode")
        if encoder is None:
            with Encoder() as own:
                return self.to_response(
                    store, sync_mode=sync_mode, output_format=output_format, parameters=parameters, encoder=own
                )
        chosen = output_format or self.output_format
        pending = [encoder.encode(image, chosen, self._metadata(j, parameters)) for j, image in enumerate(self.images)]
        data = [
            self._data_object(encoded, image, chosen, None if sync_mode else store)
            for encoded, image in zip(_all_results(pending), self.images, strict=True)
        ]
        return GenerationResponse(
            images=tuple(ImageObject(**item.model_dump(exclude={"b64_json"})) for item in data),
            seed=self.seed,
            has_nsfw_concepts=self.has_nsfw_concepts,
            prompt=self.prompt,
            timings=Timings(inference=sum(self.timings.values())),
            data=tuple(data),
            meta=Meta(usage=Usage(tokens_used=self.tokens_used)),
        )

    def _metadata(self, number: int, parameters: bool) -> ImageMetadata:
        return ImageMetadata(self.model, {**self.parameters, "seed": self.seeds[number]} if parameters else None)

    @staticmethod
    def _data_object(encoded: bytes, image: Image.Image, output_format: OutputFormat, store: ImageStore | None) -> DataObject:
        content_type = CONTENT_TYPES[output_format]
        if store is None:
            b64_json: str | None = base64.b64encode(encoded).decode("ascii")
            url = f"data:{content_type};base64,{b64_json}"
        else:
            url, b64_json = store.put(f"{secrets.token_hex(16)}.{output_format}", encoded, content_type), None
        return DataObject(url=url, content_type=content_type, width=image.width, height=image.height, b64_json=b64_json)


def _all_results(futures: list[Future[T]]) -> list[T]:
    """Results of all, after all have ended: one error must not abandon the rest."""
    for future in futures:
        future.exception()
    return [future.result() for future in futures]
