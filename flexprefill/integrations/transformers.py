"""Attention of Hugging Face transformers' models, as the implementation named "flexprefill".

    from flexprefill.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flexprefill")

Prompts go through the search. Steps of decoding are dense. Layers that the search cannot do are attended exactly: those
with a sliding window shorter than the prompt, and those that are not causal, such as an image encoder's. A soft cap and
sinks are part of the attention over the kept blocks. Padding is cut away before the search: a padded prompt keeps
the same blocks as alone. "paged|flexprefill" does the same in continuous batching.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexprefill.config import PrefillConfig, check_config
from flexprefill.errors import UnsupportedError
from flexprefill.integrations.continuous_batching import Paged
from flexprefill.integrations.exact import attend_exactly
from flexprefill.integrations.layer import Layer, attend_layer
from flexprefill.integrations.model_classes import check_model
from flexprefill.integrations.prompt_mask import PromptMask
from flexprefill.integrations.prompts import Prompts, attend_each
from flexprefill.integrations.published import PUBLISHED as PUBLISHED
from flexprefill.integrations.published import published_for
from flexprefill.integrations.transformers_internals import (
    PAGED,
    RESERVED,
    AttentionInterface,
    AttentionMaskInterface,
    forget_name,
    is_taken,
    sdpa_attention_forward,
    watch_models,
)
from flexprefill.integrations.transformers_masks import as_int, has_shapes_alone, prompt_mask
from flexprefill.runtime.listeners import is_recording
from flexprefill.runtime.thread_state import of_one_dtype
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.defaults import RECOMMENDED
from flexprefill.variant.inputs import resolve_scale
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import AttentionVariant

_registered: set[str] = set()


def register(
    config: PrefillConfig | None = None,
    *,
    name: str = "flexprefill",
    layers: Mapping[int, PrefillConfig | None] | None = None,
) -> None:
    """Makes ``attn_implementation=name`` known to transformers, until ``unregister``.

    Models take it in ``from_pretrained``, ``from_config`` and ``set_attn_implementation``. Registering a name again
    replaces its settings. The name ``"paged|" + name`` is the same for continuous batching (``generate_batch``).

    Args:
        config: The settings of every layer. Default: `PrefillConfig.recommended()`, the two-sided search. Layers with a
            soft cap, and prompts that are packed in a row, take the setting published for the model's type
            (``flexprefill.integrations.transformers.PUBLISHED``, by ``model.config.model_type``), and
            ``PrefillConfig()`` for other types.
        name: The name to use as ``attn_implementation``. It must not contain the parts by which transformers knows its
            own names.
        layers: Settings of single layers, by their index. None keeps a layer dense. FlashPrefill-V2's setting is
            ``register(PrefillConfig.published("FlashPrefill-V2"), layers=dict.fromkeys(range(4)))``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``name`` is taken or reserved, or a layer's index is negative.
    """
    if config is not None:
        check_config(config)
    _check_name(name)
    layers = _checked_layers(layers)
    if name not in _registered and (is_taken(name) or is_taken(PAGED + name)):
        raise ValueError(f"name {name!r} is an attention implementation of transformers' or another library's")
    AttentionInterface.register(name, _attention_function(config, layers))
    AttentionMaskInterface.register(name, prompt_mask)
    # without a mask function: continuous batching has no padding and makes no masks
    AttentionInterface.register(PAGED + name, _paged_attention_function(config, layers, PAGED + name))
    _registered.add(name)
    watch_models(_check_model)


def unregister(name: str = "flexprefill") -> None:
    """Takes back ``register``, the name for continuous batching too. Models that still use a name raise KeyError.

    Args:
        name: A name that was registered.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: ``name`` was not registered.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name not in _registered:
        raise ValueError(f"name {name!r} is not registered; registered are {sorted(_registered)}")
    forget_name(name)
    forget_name(PAGED + name)
    _registered.remove(name)
    if not _registered:
        watch_models(None)


def _check_model(model: nn.Module, implementation: object) -> None:
    if isinstance(implementation, str) and implementation.removeprefix(PAGED) in _registered:
        check_model(model, implementation)


class AskedAttention(NamedTuple):
    """What transformers asks an attention function for besides tensors and mask."""

    dropout: float = 0.0
    scaling: float | None = None
    is_causal: bool | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None
    position_bias: Tensor | None = None
    output_attentions: bool | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AskedAttention:
        """From the keyword arguments of a call. The others do not change what attention is."""
        wanted = {name: given[name] for name in cls._fields if name in given}
        for name, plain in (("scaling", _as_float), ("softcap", _as_float), ("sliding_window", as_int)):
            if wanted.get(name) is not None:
                wanted[name] = plain(wanted[name])
        asked = cls(**wanted)
        if asked.dropout > 0:
            raise UnsupportedError(f"dropout must be 0, got {asked.dropout}: a prefill is inference, call model.eval()")
        if asked.position_bias is not None:
            raise UnsupportedError(
                "position_bias is not supported; models with learned position biases (T5) have it. Load them with "
                'attn_implementation="sdpa" or "eager"'
            )
        if asked.output_attentions:
            raise UnsupportedError("output_attentions is not supported: attention weights are never held")
        return asked

    def variant(self, prompts: Prompts | None = None) -> AttentionVariant:
        """What attention is besides causal."""
        window, sequences = (None, None) if prompts is None else (prompts.window, prompts.sequences)
        return AttentionVariant(
            sequences=sequences,
            sliding_window=window,
            soft_cap=self.softcap,
            sinks=None if self.s_aux is None else self.s_aux.detach(),
        )


def _attention_function(
    config: PrefillConfig | None, layers: dict[int, PrefillConfig | None]
) -> Callable[..., tuple[Tensor, None]]:
    """The attention function for transformers' AttentionInterface, with these settings."""

    def flexprefill_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: BlockMask | Tensor | None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """Takes query [B, Hq, S_q, D], key and value [B, Hkv, slots, D]. Gives ([B, S_q, Hq, Dv], None)."""
        asked = AskedAttention.of(given)
        if has_shapes_alone(query):
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
        query, key, value = of_one_dtype(query, key, value)
        prompts = _prompts_of(attention_mask, query, key)
        if query.shape[2] == 1 or (prompts is None and not _is_causal(module, asked)):
            mask = attention_mask if isinstance(attention_mask, Tensor) else None
            return _attend_all(module, query, key, value, mask, asked), None
        if prompts is None:
            prompts = _whole_prompt(attention_mask, query, key, asked)
        prompts = _packed_by(prompts, given, query)
        layer = _layer_of(module, config, layers, resolve_scale(asked.scaling, query.shape[3]), asked.variant(prompts))
        if prompts.real is not None and prompts.window is not None:
            output = _attend_among_gaps(layer, query, key, value, prompts)
        else:
            output = attend_each(functools.partial(attend_layer, layer), query, key, value, prompts)
        return output.transpose(1, 2).contiguous(), None

    return flexprefill_attention


def _paged_attention_function(
    config: PrefillConfig | None, layers: dict[int, PrefillConfig | None], name: str
) -> Callable[..., tuple[Tensor, None]]:
    """The attention function for continuous batching, with these settings."""

    def flexprefill_paged_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: BlockMask | Tensor | None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        """Takes query [1, Hq, tokens, D], key and value [1, Hkv, tokens, D]. Gives ([1, tokens, Hq, Dv], None)."""
        asked = AskedAttention.of(given)
        paged = Paged.of(module, name, asked.sliding_window, given)
        if attention_mask is not None or not _is_causal(module, asked):
            raise UnsupportedError(
                f"attention_mask must be None and the layer causal for {name!r}, got "
                f"{type(attention_mask).__name__} in {type(module).__name__}"
            )
        variant = replace(asked.variant(), sliding_window=paged.window)
        layer = _layer_of(module, config, layers, resolve_scale(asked.scaling, query.shape[3]), variant)

        def attend_prompt(query: Tensor, key: Tensor, value: Tensor, last: bool) -> Tensor:
            return attend_layer(layer, query, key, value, last_chunk=last)

        def attend_steps(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
            return _attend_all(module, query, key, value, seen, asked)

        return paged.attend(query, key, value, attend_prompt, attend_steps), None

    return flexprefill_paged_attention


def _attend_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: AskedAttention
) -> Tensor:
    """Dense attention [B, S_q, Hq, Dv] to all that a mask shows, of a single query or without causality."""
    if mask is not None and mask.shape[-1] != key.shape[2]:
        raise UnsupportedError(
            f"key must have the length that attention_mask {list(mask.shape)} was made for, got {key.shape[2]} keys"
        )
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)  # under autocast they differ
    if asked.softcap is None and asked.s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, scaling=asked.scaling, is_causal=asked.is_causal
        )[0]
    scale = resolve_scale(asked.scaling, query.shape[3])
    return attend_exactly(query, key, value, scale, asked.variant(), causal=False, mask=mask).transpose(1, 2)


def _attend_among_gaps(layer: Layer, query: Tensor, key: Tensor, value: Tensor, prompts: Prompts) -> Tensor:
    """Attention within a window that counts slots, padding included, as transformers' own masks do."""
    if is_recording():
        raise UnsupportedError(
            "record_masks cannot record a layer with a sliding window where padding stands between tokens"
        )
    assert prompts.real is not None
    used = prompts.offset + query.shape[2]
    mask = prompts.real[:, None, None]
    output = attend_exactly(query, key[:, :, :used], value[:, :, :used], layer.scale, layer.variant, mask=mask)
    return output.masked_fill(~prompts.real[:, None, prompts.offset :, None], 0)


def _is_causal(module: nn.Module, asked: AskedAttention) -> bool:
    return getattr(module, "is_causal", True) if asked.is_causal is None else asked.is_causal


def prompts_of(module: nn.Module, query: Tensor, key: Tensor, mask: Any, asked: AskedAttention) -> Prompts:
    """The prompts of a call of causal attention; UnsupportedError for another."""
    if (prompts := _prompts_of(mask, query, key)) is not None:
        return prompts
    if not _is_causal(module, asked):
        raise UnsupportedError(f"{type(module).__name__} is not causal")
    return _whole_prompt(mask, query, key, asked)


def _prompts_of(attention_mask: BlockMask | Tensor | None, query: Tensor, key: Tensor) -> Prompts | None:
    """The prompts of the mask function's own mask, once it fits query and key; None for a tensor or no mask."""
    if isinstance(attention_mask, PromptMask):
        attention_mask.check_lengths(query, key)
        return attention_mask.prompts
    if attention_mask is None or isinstance(attention_mask, Tensor):
        return None
    raise UnsupportedError(f"attention_mask must be the mask function's own, got {type(attention_mask).__name__}")


def _whole_prompt(attention_mask: object, query: Tensor, key: Tensor, asked: AskedAttention) -> Prompts:
    """The prompts of a model that calls causal attention without the mask function's mask.

    Raises:
        UnsupportedError: It has another mask, or it needs one and has none.
    """
    if isinstance(attention_mask, Tensor):
        raise UnsupportedError(
            "attention_mask must be None or a padding mask [B, tokens] for a prompt, because the search follows no "
            f"other mask, got Tensor {list(attention_mask.shape)}"
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len != kv_len:
        raise UnsupportedError(
            f"attention_mask must be given where keys are more than queries, got None for {q_len} queries and {kv_len} "
            "keys: it says where the queries stand"
        )
    return Prompts(query.shape[0], 0, asked.sliding_window, None, query.device)


def _packed_by(prompts: Prompts, given: Mapping[str, Any], query: Tensor) -> Prompts:
    """The prompts, packed as a flattening collator's arguments say.

    transformers' mask functions read ``position_ids`` only where there is neither a cache nor a padding mask, and never
    ``cu_seq_lens_q``. FlashAttention's implementations read both, and so does this.

    Raises:
        UnsupportedError: ``cu_seq_lens_q`` cannot be followed.
    """
    bounds, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    in_a_row = prompts.spans is None and prompts.offset == 0
    if bounds is None:
        if is_tracing() or not in_a_row or prompts.sequences is not None or positions is None:
            return prompts
        return prompts.packed_by(positions, query.shape[2])
    if is_tracing() or not in_a_row or not torch.equal(bounds, given.get("cu_seq_lens_k", bounds)):
        raise UnsupportedError(
            "cu_seq_lens_q must be cu_seq_lens_k, of sequences packed in a row, without a filled cache, "
            "attention_mask or torch.compile"
        )
    return prompts.packed_as(Sequences.from_cu_seqlens(bounds.to(query.device), query.shape[2]))


def _layer_of(
    module: nn.Module,
    config: PrefillConfig | None,
    layers: Mapping[int, PrefillConfig | None],
    scale: float,
    variant: AttentionVariant,
) -> Layer:
    """A module's Layer, by the settings of all layers and those of single ones."""
    index: Any = getattr(module, "layer_idx", None)
    model: Any = getattr(module, "config", None)
    count = getattr(model, "num_hidden_layers", None)
    if layers and isinstance(count, int) and not model.is_encoder_decoder and max(layers) >= count:
        raise ValueError(f"layers must be below {count}, the model's number of layers, got {max(layers)}")
    kind = f"{type(module).__name__} of {_model_type(module)}"
    if index in layers:
        return Layer(layers[index], scale, variant, kind)
    if config is not None:
        return Layer(config, scale, variant, kind)
    return Layer(RECOMMENDED, scale, variant, kind, elsewhere=published_for(_model_type(module)))


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", "a model")


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


def _as_float(number: Any) -> Any:
    """A float from a tensor of one element or from NumPy's number. Anything else stays as it is."""
    if isinstance(number, Tensor):
        return number if is_tracing() or has_shapes_alone(number) else float(number)
    return number if number is None or isinstance(number, (int, float)) else float(number)
