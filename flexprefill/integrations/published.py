"""The setting published for a model of a type, by the ``model_type`` of its Hugging Face config."""

from __future__ import annotations

from flexprefill.config import PrefillConfig

PUBLISHED = {
    "llama": PrefillConfig.published("Llama-3.1-8B"),
    "qwen2": PrefillConfig.published("Qwen2.5-7B"),
    "qwen3_moe": PrefillConfig.published("Qwen3-30B-A3B"),
    "qwen2_5_vl_text": PrefillConfig.published("Qwen2.5-VL"),
    "qwen3_vl_text": PrefillConfig.published("Qwen3-VL"),
}


def published_for(model_type: str) -> PrefillConfig:
    """The setting published for a type of model, and ``PrefillConfig()`` for other types."""
    return PUBLISHED.get(model_type, PrefillConfig())
