"""Attention of one layer of a model: sparse by a search, exact over a sliding window, or dense."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from flexprefill.attention.backends import Request, choose_dense
from flexprefill.attention.dense import dense_attention
from flexprefill.attention.prefill import prefill_attention
from flexprefill.blockmap.map import all_blocks
from flexprefill.config import PrefillConfig
from flexprefill.runtime.listeners import is_recording, note
from flexprefill.search.blocks import search_blocks
from flexprefill.variant.inputs import check_attention_inputs
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import PLAIN, AttentionVariant


@dataclass(frozen=True)
class Layer:
    """What a layer's attention is.

    Attributes:
        config: which blocks it keeps; None keeps all.
        scale: factor on the dot products.
        variant: without sequences. Where its window is shorter than the keys it is attended exactly, without a search.
    """

    config: PrefillConfig | None
    scale: float
    variant: AttentionVariant = PLAIN


def attend_layer(layer: Layer, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Causal attention of the last S_q of S_kv positions.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].
        lengths: int32 [B], how many of the positions hold tokens; those behind are padding, which has to be finite.
            None is all of them.

    Returns:
        [B, Hq, S_q, Dv], anything where a query is padding.

    Raises:
        TypeError, ValueError: as :func:`flexprefill.prefill_attention`.
    """
    check_attention_inputs(query, key, value)
    config, variant, scale = layer.config or PrefillConfig(), layer.variant, layer.scale
    if variant.sliding_window is not None and variant.sliding_window >= key.shape[2]:
        variant = replace(variant, sliding_window=None)
    block_map = None
    if variant.sliding_window is not None or layer.config is None:
        if variant == PLAIN:
            return _attend_dense(query, key, value, scale)
        block_map = all_blocks(query, key, config.block_size)
    elif lengths is not None:
        # their queries see no padding, which is behind them: the attention need not know of it
        padded = replace(variant, sequences=Sequences.from_lengths(lengths, key.shape[2]))
        block_map = search_blocks(query, key, config, variant=padded, scale=scale)
    return prefill_attention(query, key, value, config, variant=variant, block_map=block_map, scale=scale)


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if is_recording():
        note(all_blocks(query, key, PrefillConfig.block_size))
    request = Request.of(query, key, value, block_size=128, mods=False, scale=scale, lse=False, max_scores=False)
    choice = choose_dense(request, "the layer keeps all blocks")
    return dense_attention(query, key, value, scale=scale, kernel=choice.name)
