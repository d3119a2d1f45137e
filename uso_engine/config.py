"""Settings of an engine: one frozen, typed tree with defaults in code; a TOML file holds only what deviates.

Importing this needs neither torch nor a GPU, so that a command line can list and explain configurations quickly.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from .config_files import config_folder as config_folder
from .config_files import list_configs as list_configs
from .config_files import locate_config, suggestion
from .errors import ConfigError, MissingFileError
from .imaging.sizes import SizeLimits
from .model.params import FamilyName, TransformerParams
from .precision.tiers import TextTierName, TierName
from .queue_limits import QueueLimits
from .sampling_settings import QualityConfig, SamplingConfig
from .section import Section
from .weights.autoencoder_keys import AutoencoderParams
from .weights.model_sizes import MOST_PROBLEMS, read_sizes, shown

EMBEDDED_PREFIX = "embedded:"
# Bounds of what a file may ask for, far above every use: what is beyond them is a slip, and would be found out only after the
# memory was asked for. A prompt has at most 4,000 characters, and no tokenizer makes more tokens of it.
LARGEST_SIDE = 8_192
MOST_PROMPT_TOKENS = 4_096
MOST_LORAS = 64
LARGEST_CACHE_MIB = 1_048_576
LARGEST_FLOAT32 = 3.4e38
_MOST_FILE_BYTES = 1_000_000


class TransformerConfig(Section):
    """The base model: a checkpoint file or a diffusers folder, its sizes, and what its LoRA makes of it."""

    checkpoint: str
    family: FamilyName = "uso"
    # "kontext" takes FLUX.1-Kontext-dev, which no key tells from dev and for which neither family was trained.
    base: Literal["dev", "kontext"] = "dev"
    params: Annotated[TransformerParams, BeforeValidator(partial(read_sizes, TransformerParams))] = TransformerParams()


class LoRAConfig(Section):
    """A LoRA and how strongly it is merged."""

    path: str
    weight: float = Field(1.0, ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)


class ProjectorConfig(Section):
    """USO's style projector: vision tokens of one image to style tokens of each of three levels."""

    checkpoint: str
    vision_tokens: int = Field(729, ge=1, le=65_536)
    vision_width: int = Field(1152, ge=1, le=65_536)
    style_tokens: int = Field(64, ge=1, le=4_096)


class VisionConfig(Section):
    """The SigLIP vision encoder's folder, or a single file of it."""

    folder: str


class TextEncoderConfig(Section):
    """A text encoder's folder or single file, its tokenizer's folder where that is another, and the padded length in tokens."""

    folder: str
    tokenizer: str | None = None
    max_length: int = Field(ge=2, le=MOST_PROMPT_TOKENS)


class AutoencoderConfig(Section):
    """The autoencoder's checkpoint or diffusers folder.

    `tile_side` computes images of more pixels than a square with this side in strips of so many, to the same result but for
    rounding; `decode_dtype` "bf16" decodes in bfloat16 (channels last), which is lossy: the encoder stays in float32 as the
    authors run it.
    """

    checkpoint: str
    params: Annotated[AutoencoderParams, BeforeValidator(partial(read_sizes, AutoencoderParams))] = AutoencoderParams()
    tile_side: int | None = Field(None, ge=16, le=LARGEST_SIDE)
    decode_dtype: Literal["float32", "bf16"] = "float32"


class ContentConfig(Section):
    """How content images are prepared."""

    long_side: int = Field(512, ge=16, le=LARGEST_SIDE)


class DefaultsConfig(Section):
    """What a request gets that does not say."""

    width: int = Field(1024, ge=16, le=LARGEST_SIDE)
    height: int = Field(1024, ge=16, le=LARGEST_SIDE)
    steps: int = Field(28, ge=1, le=50)
    guidance: float = Field(4.0, ge=1, le=20)


class LimitsConfig(Section):
    """Custom image sizes that are accepted, in pixels."""

    min_side: int = Field(256, ge=16, le=LARGEST_SIDE)
    max_side: int = Field(2048, ge=16, le=LARGEST_SIDE)
    max_pixels: int = Field(4_194_304, ge=256, le=LARGEST_SIDE**2)

    @property
    def sizes(self) -> SizeLimits:
        """The same as the limits that requests are checked against."""
        return SizeLimits(self.min_side, self.max_side, self.max_pixels)

    @model_validator(mode="after")
    def _ordered(self) -> LimitsConfig:
        _ = self.sizes  # It refuses limits that contradict each other.
        return self


class SafetyConfig(Section):
    """The image classifier that withholds unsafe pictures.

    `forbid_disabling` refuses requests that switch it off. `runtime` "onnx" runs `onnx_file`, which `uso-engine export-safety`
    makes of `folder`, on ONNX Runtime's `provider`; "torch" runs the folder's weights on the engine's device.
    """

    folder: str = "Falconsai/nsfw_image_detection"
    threshold: float = Field(0.5, gt=0, lt=1)
    forbid_disabling: bool = False
    runtime: Literal["torch", "onnx"] = "torch"
    onnx_file: str | None = None
    provider: Literal["cpu", "cuda"] | None = Field(None, description='only with runtime "onnx", which takes "cpu" by default')

    @model_validator(mode="after")
    def _of_one_runtime(self) -> SafetyConfig:
        if self.runtime == "onnx" and self.onnx_file is None:
            raise ValueError('runtime "onnx" needs onnx_file, which `uso-engine export-safety` makes')
        if self.runtime == "torch" and self.provider is not None:
            raise ValueError(f'provider {self.provider!r} is for runtime "onnx"; runtime "torch" uses the engine\'s device')
        return self


class CacheConfig(Section):
    """Bounds of the three caches, in MiB; 0 keeps nothing."""

    prompt_mib: float = Field(256, ge=0, le=LARGEST_CACHE_MIB)
    style_mib: float = Field(64, ge=0, le=LARGEST_CACHE_MIB)
    content_mib: float = Field(64, ge=0, le=LARGEST_CACHE_MIB)


class PrecisionConfig(Section):
    """How weights are kept and multiplied.

    `keep` names the transformer's sensitive layers, which a quantised tier keeps in a higher precision; `int8_activations`
    makes the int8 tier multiply in int8; `text_encoder` is T5's precision; `check_contents` compares every tensor of a
    quantised file with its hash when it is loaded.
    """

    tier: TierName = "bf16"
    keep: tuple[str, ...] | None = Field(None, strict=False)  # TOML has lists
    int8_activations: bool = False
    text_encoder: TextTierName = "bf16"
    check_contents: bool = True


class ParallelConfig(Section):
    """Processes of this machine that compute every step together, each on a GPU of its own.

    `ulysses` is how many; each has a share of every sequence's rows and of the heads. `step_timeout_s` is how long one waits
    for the others within a step before it gives them up.
    """

    ulysses: int = Field(1, ge=1, le=64)
    step_timeout_s: float = Field(120, ge=1, le=86_400)


class EngineConfig(Section):
    """One way to run the engine. Parts that are absent (text encoders, say) are parts this engine does not have."""

    name: str
    description: str = ""
    demonstration: bool = False
    model_name: str = "bytedance/uso"
    memory_budget_gib: float | None = Field(
        None, ge=0.001, le=1e6, description="GPU memory that may be used, in GiB; by default what the GPU has free"
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="steps as CUDA graphs: where the host is the slower one, wherever they repeat, or never"
    )
    cuda_graph_mib: float = Field(
        1024, ge=1, le=LARGEST_CACHE_MIB, description="GPU memory of all CUDA graphs together, in MiB"
    )
    transformer: TransformerConfig
    loras: tuple[LoRAConfig, ...] = Field((), strict=False, max_length=MOST_LORAS)  # TOML has lists
    projector: ProjectorConfig | None = None
    vision: VisionConfig | None = None
    t5: TextEncoderConfig | None = None
    clip: TextEncoderConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    content: ContentConfig = ContentConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    sampling: SamplingConfig = SamplingConfig()
    quality: QualityConfig = QualityConfig()
    limits: LimitsConfig = LimitsConfig()
    safety: SafetyConfig | None = None
    cache: CacheConfig = CacheConfig()
    queue: QueueLimits = QueueLimits()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    base_folder: Path | None = Field(None, exclude=True, description="where relative paths start; the TOML file's folder")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if (self.projector is None) != (self.vision is None):
            raise ValueError("[projector] and [vision] come together: style needs both")
        if (self.t5 is None) != (self.clip is None):
            raise ValueError("[t5] and [clip] come together: a prompt needs both")
        heads, processes = self.transformer.params.num_heads, self.parallel.ulysses
        if heads % processes:
            raise ValueError(f"parallel.ulysses is {processes}, which does not divide the transformer's {heads} heads")
        if processes > 1 and self.memory_budget_gib is not None:
            raise ValueError("parallel.ulysses and memory_budget_gib exclude each other: every process holds all weights")
        taken = self.transformer.params.latent_channels
        if self.autoencoder is not None and (made := self.autoencoder.params.z_channels) != taken:
            raise ValueError(f"autoencoder.params.z_channels is {made}, but the transformer takes latents of {taken} channels")
        return self


def load_config(name_or_path: str | Path) -> EngineConfig:
    """Read and check a configuration.

    Args:
        name_or_path: a name from `list_configs`, or a path to a TOML file.

    Raises:
        MissingFileError: no such name or file.
        ConfigError: not TOML, an unknown key (the nearest known one is named), a wrong type or value; all of them are listed.
    """
    path = locate_config(name_or_path)
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: lists within lists, a thousand deep
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from error
    if "base_folder" in table:
        raise ConfigError(f"{path}: base_folder is not a setting; relative paths start at the file's own folder")
    return parse_config({"name": path.stem, **table, "base_folder": path.parent.resolve()}, str(path))


def parse_config(table: Mapping[str, object], source: str = "configuration") -> EngineConfig:
    """Check a configuration given as nested tables.

    Raises:
        ConfigError: as for `load_config`.
    """
    try:
        return EngineConfig.model_validate(table)
    except ValidationError as error:
        problems = [_problem(dict(item)) for item in error.errors()]
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ConfigError(f"{source}: " + "; ".join([*problems[:MOST_PROBLEMS], *more])) from error


def _problem(item: dict[str, object]) -> str:
    """One validation error as a sentence that names the key."""
    location = item["loc"]
    assert isinstance(location, tuple)
    key = ".".join(f"{part:.80}" if isinstance(part, str) else str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}{suggestion(str(location[-1]), _known_keys(location[:-1]))}"
    if item["type"] == "missing":
        return f"{key} is required"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    said = message if isinstance(given, Mapping | Section) else f"{message}, got {shown(given)}"
    return f"{key}: {said}" if key else said  # What is wrong with several settings together names them itself.


def _known_keys(location: tuple[object, ...]) -> list[str]:
    """Keys of the table at a location in the tree."""
    model: type[BaseModel] = EngineConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        model = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [name for name in model.model_fields if name != "base_folder"]
