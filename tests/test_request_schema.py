"""The JSON schema that clients read: the hosted contract, with the limits that hold here."""

from __future__ import annotations

from typing import Any

import pytest

from uso_engine.api.request import GenerationRequest, RequestDefaults, request_model
from uso_engine.imaging.sizes import SizeLimits

Wire = request_model(wire=True)


def rules(kind: type[GenerationRequest]) -> dict[str, dict[str, Any]]:
    """Properties without what is only prose."""
    properties = kind.model_json_schema()["properties"]
    return {name: {k: v for k, v in rule.items() if k not in ("title", "description")} for name, rule in properties.items()}


def test_the_schema_says_the_contract() -> None:
    uri = {"type": "string", "format": "uri"}
    side = {"type": "integer", "minimum": 256, "maximum": 2048}
    presets = ["square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]
    found = rules(Wire)
    size = found.pop("image_size")
    own = {
        "type": "object",
        "properties": {"width": side, "height": side},
        "required": ["width", "height"],
        "additionalProperties": False,
        "description": "Rounded down to multiples of 16; at most 4194304 pixels.",
        "x-max-pixels": 4_194_304,
    }
    assert size == {"default": "square_hd", "anyOf": [{"type": "string", "enum": presets}, own]}
    assert found == {
        "model": {"type": "string", "const": "bytedance/uso"},
        "prompt": {"type": "string", "maxLength": 4000},
        "image_urls": {
            "type": "array",
            "prefixItems": [{"anyOf": [uri, {"type": "null"}, {"const": ""}]}],
            "items": uri,
            "maxItems": 3,
        },
        "negative_prompt": {"type": "string", "maxLength": 4000, "default": ""},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 28},
        "guidance_scale": {"type": "number", "minimum": 1, "maximum": 20, "default": 4.0},
        "keep_size": {"type": "boolean", "default": False},
        "num_images": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
        "seed": {"type": "integer", "minimum": 1, "maximum": 2**53 - 1},
        "sync_mode": {"type": "boolean", "default": False},
        "enable_safety_checker": {"type": "boolean", "default": True},
        "output_format": {"type": "string", "enum": ["png", "jpeg"], "default": "png"},
        "true_cfg_scale": {"type": "number", "minimum": 1, "maximum": 20, "default": 2.0},
        "style_scale": {"type": "number", "minimum": 0, "maximum": 4, "default": 1.0},
        "content_long_side": {"type": "integer", "minimum": 64, "maximum": 1024, "default": 512},
    }
    schema = Wire.model_json_schema()
    assert schema["required"] == ["model", "prompt", "image_urls"]
    assert schema["additionalProperties"] is False
    assert GenerationRequest.model_json_schema()["required"] == ["prompt"]


def test_every_field_is_described_and_extensions_are_marked() -> None:
    properties = Wire.model_json_schema()["properties"]
    assert all(rule["description"] for rule in properties.values())
    extensions = {name for name, rule in properties.items() if rule["description"].startswith("Extension")}
    assert extensions == {"true_cfg_scale", "style_scale", "content_long_side"}
    assert "Extension: null" in properties["image_urls"]["description"]


@pytest.mark.parametrize("wire", [True, False])
def test_other_limits_and_defaults_show(wire: bool) -> None:
    kind = request_model(SizeLimits(64, 600, 600 * 600), RequestDefaults(128, 96, 4, 3.0, 128), wire=wire)
    found = rules(kind)
    text, own = found["image_size"]["anyOf"]
    assert text["enum"] == ["square"]
    assert own["properties"]["width"] == {"type": "integer", "minimum": 64, "maximum": 600}
    assert "at most 360000 pixels" in own["description"]
    assert found["image_size"]["default"] == {"width": 128, "height": 96}
    assert [found[name]["default"] for name in ("num_inference_steps", "guidance_scale", "content_long_side")] == [4, 3.0, 128]
    assert ("model" in kind.model_json_schema()["required"]) is wire


def test_a_default_with_a_name_is_named() -> None:
    assert rules(request_model(defaults=RequestDefaults(512, 512)))["image_size"]["default"] == "square"
