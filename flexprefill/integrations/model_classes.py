"""A check, when a model is made, whether its class takes flexprefill as its attention."""

from __future__ import annotations

import logging
from typing import Any

from flexprefill.errors import UnsupportedError
from flexprefill.integrations.transformers_internals import attention_classes_without, has_own_attention
from flexprefill.runtime.state import remembered

logger = logging.getLogger("flexprefill")


def check_model(model: Any, implementation: str) -> None:
    """Raises UnsupportedError for a text model whose class computes its attention itself.

    A model composed of others passes, because each of those is checked itself. Other parts that compute their attention
    themselves, such as a vision tower, stay as they are. The log names them.
    """
    kind = type(model)
    table = attention_classes_without(kind, implementation)
    composed = bool(getattr(model.config, "sub_configs", None))
    own = not composed and has_own_attention(kind)
    if table is not None or (own and getattr(model, "main_input_name", "input_ids") == "input_ids"):
        raise UnsupportedError(
            f"attn_implementation must be one of transformers' own for {kind.__name__}, got {implementation!r}: the "
            "class computes its attention itself and does not go through transformers' AttentionInterface. Classes "
            "that do, such as LlamaForCausalLM, Qwen3ForCausalLM, MistralForCausalLM, Gemma3ForCausalLM and "
            f"GPTNeoXForCausalLM, take {implementation!r}; load this one with "
            'attn_implementation="sdpa" or "eager"'
        )
    if own:
        _say_own(kind.__name__, implementation)


@remembered("models that were said to attend by themselves", most=256)
def _say_own(kind: str, implementation: str) -> None:
    logger.warning("%s computes its attention itself, which stays as it is: %s does not reach it", kind, implementation)
