"""The configuration of an encoder from the shapes of its weights, for files that have no config.json beside them.

What shapes cannot tell, such as the number of attention heads, is known for the widths that were published. Of another width
nothing is guessed: a folder with its config.json says it.
Source: config.json of google/t5-v1_1-xxl, openai/clip-vit-large-patch14 and google/siglip-so400m-patch14-384, and of their
smaller relatives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from uso_engine.errors import CheckpointError
from uso_engine.weights.files.tensor_source import TensorSource

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, SiglipVisionConfig, T5Config

# 64 is the embedded demonstration model's.
_CLIP_HEADS: Mapping[int, int] = {64: 4, 512: 8, 768: 12, 1024: 16, 1280: 20}
_SIGLIP_HEADS: Mapping[int, int] = {64: 4, 768: 12, 1024: 16, 1152: 16}
# 384 is no multiple of 14: the last pixels of every row are in no patch.
_SIGLIP_SIDES: Mapping[tuple[int, int], int] = {(14, 27): 384}


def t5_config(source: TensorSource) -> T5Config:
    """The configuration of a T5 v1.1 encoder, as FLUX uses one.

    Args:
        source: weights under transformers' keys.

    Raises:
        CheckpointError: a weight that decides is missing, or there is no such T5.
    """
    from transformers import T5Config

    first = "encoder.block.0.layer"
    vocabulary, width = _shape(source, "shared.weight", 2)
    inner, _ = _shape(source, f"{first}.0.SelfAttention.q.weight", 2)
    buckets, heads = _shape(source, f"{first}.0.SelfAttention.relative_attention_bias.weight", 2)
    feed_forward, _ = _shape(source, f"{first}.1.DenseReluDense.wi_0.weight", 2)
    if not heads or inner % heads:
        raise CheckpointError(f"{source.describe()}: {inner} rows of T5's queries are no multiple of its {heads} heads")
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=feed_forward,
        num_layers=_layers(source, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        is_encoder_decoder=False,
        use_cache=False,
    )


def clip_config(source: TensorSource) -> CLIPTextConfig:
    """The configuration of OpenAI's CLIP text model; errors as for `t5_config`."""
    from transformers import CLIPTextConfig

    vocabulary, width = _shape(source, "text_model.embeddings.token_embedding.weight", 2)
    positions, _ = _shape(source, "text_model.embeddings.position_embedding.weight", 2)
    feed_forward, _ = _shape(source, "text_model.encoder.layers.0.mlp.fc1.weight", 2)
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        projection_dim=width,
        num_hidden_layers=_layers(source, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(source, width, _CLIP_HEADS, "CLIP text model"),
        max_position_embeddings=positions,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        # The last two words of the vocabulary.
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def siglip_config(source: TensorSource) -> SiglipVisionConfig:
    """The configuration of a SigLIP vision tower; errors as for `t5_config`."""
    from transformers import SiglipVisionConfig

    if "vision_model.embeddings.class_embedding" in source.keys():  # noqa: SIM118 - a source is not a mapping
        raise CheckpointError(
            f"{source.describe()}: this is CLIP's vision tower; USO's style projector reads SigLIP "
            "(sigclip_vision_patch14_384.safetensors, or google/siglip-so400m-patch14-384)"
        )
    width, channels, patch, _ = _shape(source, "vision_model.embeddings.patch_embedding.weight", 4)
    patches, _ = _shape(source, "vision_model.embeddings.position_embedding.weight", 2)
    feed_forward, _ = _shape(source, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise CheckpointError(f"{source.describe()}: {patches} positions of the vision tower are not those of a square")
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=_layers(source, r"vision_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(source, width, _SIGLIP_HEADS, "SigLIP"),
        num_channels=channels,
        image_size=_SIGLIP_SIDES.get((patch, grid), patch * grid),
        patch_size=patch,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head="vision_model.head.probe" in source.keys(),  # noqa: SIM118 - a source is not a mapping
    )


def _shape(source: TensorSource, key: str, axes: int) -> tuple[int, ...]:
    if key not in source.keys():  # noqa: SIM118 - a source is not a mapping
        raise CheckpointError(f"{source.describe()}: {key} is missing, which says how large the model is")
    shape = source.shape(key)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{source.describe()}: {key} has shape {list(shape)}, expected {axes} sizes")
    return shape


def _layers(source: TensorSource, pattern: str) -> int:
    """Layers by the highest number; one that is missing between is found when the weights are loaded."""
    return 1 + max(int(match[1]) for key in source.keys() if (match := re.match(pattern, key)))  # noqa: SIM118


def _heads(source: TensorSource, width: int, known: Mapping[int, int], what: str) -> int:
    if width not in known:
        raise CheckpointError(
            f"{source.describe()}: no {what} of width {width} is known (these are: {', '.join(map(str, known))}); "
            "use a folder with its config.json, which says how many heads it has"
        )
    return known[width]
