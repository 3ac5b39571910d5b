"""Attention of Hugging Face transformers' models, as the implementation named "flexprefill".

    from flexprefill.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flexprefill")

Prompts go through the search, steps of decoding are dense. What the search cannot do is attended exactly: layers with
a sliding window that is shorter than the prompt, and layers without causality such as an image encoder's. A soft cap
and sinks are part of the attention over the kept blocks. Padding is cut away before the search: a padded prompt keeps
the blocks that it keeps alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexprefill.config import PrefillConfig, check_config
from flexprefill.errors import FlexPrefillError
from flexprefill.integrations.layer import Layer, attend_layer
from flexprefill.integrations.prompts import PADDING_BETWEEN, Prompts, Span, attend_each, bounds_of, spans_of
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.inputs import resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import AttentionVariant

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "flexprefill.integrations.transformers needs transformers 5: pip install 'flexprefill[transformers]'"
    ) from error

# transformers asks for these parts of a name, and would take ours for one of its own
RESERVED = ("flash", "sdpa", "eager", "flex_attention", "|", "/")

# by model_type: the setting that was published for a model of the kind
PUBLISHED = {
    model_type: PrefillConfig.published(model)
    for model_type, model in {
        "llama": "Llama-3.1-8B",
        "qwen2": "Qwen2.5-7B",
        "qwen3_moe": "Qwen3-30B-A3B",
        "qwen2_5_vl_text": "Qwen2.5-VL",
        "qwen3_vl_text": "Qwen3-VL",
    }.items()
}

logger = logging.getLogger("flexprefill")
_registered: set[str] = set()


def register(
    config: PrefillConfig | None = None,
    *,
    name: str = "flexprefill",
    layers: Mapping[int, PrefillConfig | None] | None = None,
) -> None:
    """Makes ``attn_implementation=name`` known to transformers, until :func:`unregister`.

    Models take it in ``from_pretrained``, ``from_config`` and ``set_attn_implementation``. Registering a name again
    replaces its settings.

    Args:
        config: the settings of every layer; None takes those that were published for the kind of model
            (``flexprefill.integrations.transformers.PUBLISHED``, by ``model.config.model_type``), and
            ``PrefillConfig()`` for a kind without.
        name: to be used as ``attn_implementation``; without the parts by which transformers knows its own.
        layers: settings of single layers, by their index; None keeps a layer dense. FlashPrefill-V2's setting is
            ``register(PrefillConfig.published("FlashPrefill-V2"), layers=dict.fromkeys(range(4)))``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``name`` is taken or reserved, or a layer's index is negative.
    """
    if config is not None:
        check_config(config)
    _check_name(name)
    layers = _checked_layers(layers)
    if name not in _registered and name in {
        *AttentionInterface._global_mapping,
        *AttentionMaskInterface._global_mapping,
    }:
        raise ValueError(f"name {name!r} is an attention implementation of transformers' or another library's")
    AttentionInterface.register(name, _attention_function(config, layers))
    AttentionMaskInterface.register(name, prompt_mask)
    _registered.add(name)


def unregister(name: str = "flexprefill") -> None:
    """Takes back :func:`register`; models that still use the name raise KeyError.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: ``name`` was not registered.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name not in _registered:
        raise ValueError(f"name {name!r} is not registered; registered are {sorted(_registered)}")
    # transformers has no function for it: del on an interface reaches the local names alone
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)
    _registered.remove(name)


def prompt_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> BlockMask | Tensor | None:
    """The mask function of transformers' AttentionMaskInterface.

    Args: as transformers gives them; ``attention_mask`` is the padding mask, bool [B, tokens].

    Returns:
        None if the queries are the last of all keys and see all keys before them; else a BlockMask whose mask_mod is
        a Prompts. For a single query, and without causality, the mask of the implementation sdpa.

    Raises:
        FlexPrefillError: the mask is one that a search over prompts cannot follow; where that shows only when a
            compiled graph runs, it is a RuntimeError.
        ValueError: padding stands between tokens.
    """
    if q_length == 1 or "allow_is_bidirectional_skip" in others:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **others,
        )
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise FlexPrefillError(f"layers that attend in chunks (attention_chunk_size={local_size}) are not supported")
    if is_tracing() and isinstance(q_offset, Tensor):
        raise FlexPrefillError(
            "past_key_values must be no filled static cache for a prompt inside torch.compile, because its length is "
            "on the device: compile the steps of decoding alone, as generate() does"
        )
    if not allow_is_causal_skip:
        # transformers says so, too, of every prompt that is compiled without a cache, in case it is packed
        _require(
            not others.get("use_vmap") and _is_causal(mask_function, batch_size, q_length, q_offset, device),
            "attention_mask must be causal with padding alone: flexprefill takes no packed sequences (position_ids "
            "that start anew) and no images whose tokens see each other",
        )
    offset = int(q_offset) - kv_offset  # waits for the device if the cache is a static one
    used = offset + q_length
    window = local_size if local_size is not None and local_size < used else None
    spans = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + used]
        # slots that the padding mask does not reach are padding
        real = nn.functional.pad(real, (0, used - real.shape[1]))
        if is_tracing():
            spans, whole = bounds_of(real)
            _require(whole, PADDING_BETWEEN)
            if offset > 0:
                _require(
                    (spans[:, 0] == 0).all(),
                    "attention_mask must have no padding before a prompt that follows a cache inside torch.compile: "
                    "pad on the right, or compile without chunks",
                )
        else:
            spans = spans_of(real)
            if set(spans) == {Span(0, used)}:
                spans = None
    if spans is None and window is None and used == kv_length:
        return None
    return Prompts(batch_size, offset, window, spans, device).to_block_mask(q_length)


def _attention_function(
    config: PrefillConfig | None, layers: dict[int, PrefillConfig | None]
) -> Callable[..., tuple[Tensor, None]]:
    """The attention function of transformers' AttentionInterface with these settings."""

    def flexprefill_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: BlockMask | Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [B, Hq, S_q, D], key and value [B, Hkv, slots, D] → ([B, S_q, Hq, Dv], None)."""
        _check_supported(dropout, position_bias, others)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = softcap is None and s_aux is None
        if plain and (not causal or query.shape[2] == 1):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
            )
        if not causal:
            raise FlexPrefillError("softcap and s_aux are supported for causal attention only")
        scale = resolve_scale(scaling, query.shape[3])
        variant = AttentionVariant(soft_cap=softcap, sinks=None if s_aux is None else s_aux.detach())
        if query.shape[2] == 1:
            with torch.no_grad():
                output = _attend_plainly(query, key, value, attention_mask, scale, variant)
            return output.transpose(1, 2), None

        prompts = _prompts_of(attention_mask)
        index = getattr(module, "layer_idx", None)
        setting = layers[index] if index in layers else config or _published(module)
        window = sliding_window if prompts is None else prompts.window
        layer = Layer(setting, scale, replace(variant, sliding_window=window))
        if prompts is None:
            output = attend_layer(layer, query, key, value)
        else:
            output = attend_each(functools.partial(attend_layer, layer), query, key, value, prompts)
        return output.transpose(1, 2).contiguous(), None

    return flexprefill_attention


def _attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, variant: AttentionVariant
) -> Tensor:
    """Attention of queries that see what a mask says, in plain PyTorch: [B, Hq, S_q, Dv] of query's dtype.

    Args:
        mask: bool, True where a key is seen, or numbers to add to the scores; broadcast to [B, Hq, S_q, S_kv]. None
            shows all keys.
    """
    if mask is None:
        return PlainAttention(query, key, scale, variant, causal=False).attend(value)[0].to(query.dtype)
    of_each = mask.expand(*query.shape[:3], key.shape[2])

    def shown(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return of_each[b, h, q_idx, kv_idx]

    def added(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + of_each[b, h, q_idx, kv_idx]

    hides = mask.dtype == torch.bool
    mods = {"mask_mods": (shown,) if hides else (), "score_mods": () if hides else (added,)}
    return PlainAttention(query, key, scale, variant, **mods, causal=False).attend(value)[0].to(query.dtype)


def _published(module: nn.Module) -> PrefillConfig:
    return PUBLISHED.get(getattr(getattr(module, "config", None), "model_type", None), PrefillConfig())


def _is_causal(
    mask_function: Callable[..., Tensor], batch_size: int, q_length: int, q_offset: int, device: torch.device | str
) -> Tensor:
    """Whether each query sees the key before its own and none sees the next: bool, no dimensions.

    So it is with a causal mask and with a window. Sequences that are packed hide their first token's predecessor, and
    tokens that see each other see the next.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    position = torch.arange(1, q_length, device=device)[None] + q_offset
    head = torch.zeros_like(position)
    before, after = (
        mask_function(batch, head, position, position - 1),
        mask_function(batch, head, position - 1, position),
    )
    return (before & ~after).all()


def _require(condition: bool | Tensor, message: str) -> None:
    """Raises FlexPrefillError unless it holds; inside torch.compile RuntimeError, when the graph runs."""
    if is_tracing() and isinstance(condition, Tensor):
        torch._assert_async(condition, message)
    elif not condition:
        raise FlexPrefillError(message)


def _prompts_of(attention_mask: BlockMask | Tensor | None) -> Prompts | None:
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask) and isinstance(attention_mask.mask_mod, Prompts):
        return attention_mask.mask_mod
    shape = f" {list(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else ""
    raise FlexPrefillError(
        "attention_mask must be None or a padding mask [B, tokens] for a prompt, which no other mask can be searched "
        f"with, got {type(attention_mask).__name__}{shape}"
    )


def _check_supported(dropout: float, position_bias: Tensor | None, others: dict[str, Any]) -> None:
    if dropout > 0:
        raise FlexPrefillError(f"dropout must be 0, got {dropout}: a prefill is inference, call model.eval()")
    if position_bias is not None:
        raise FlexPrefillError("position_bias is not supported")
    if others.get("output_attentions"):
        raise FlexPrefillError("output_attentions is not supported: attention weights are never held")


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not name or any(part in name.lower() for part in RESERVED):
        raise ValueError(f"name must be without {RESERVED}, which transformers has a meaning for, got {name!r}")


def _checked_layers(layers: object) -> dict[int, PrefillConfig | None]:
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a mapping of a layer's index to its config, got {type(layers).__name__}")
    for index, setting in layers.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers must have ints for keys, got {index!r}")
        if index < 0:
            raise ValueError(f"layers must have indices of 0 or more for keys, got {index}")
        if not (setting is None or isinstance(setting, PrefillConfig)):
            raise TypeError(f"layers[{index}] must be a PrefillConfig or None, got {type(setting).__name__}")
    return dict(layers)
