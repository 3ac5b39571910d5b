"""Attention of one layer of a model: sparse by a search, exact over a sliding window, or dense; capped, with sinks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexprefill.attention import all_blocks, prefill_attention
from flexprefill.backends import Request, choose_dense
from flexprefill.checks import check_attention_inputs
from flexprefill.config import PrefillConfig
from flexprefill.dense import dense_attention
from flexprefill.recording import is_recording, note
from flexprefill.search import search_blocks
from flexprefill.sequences import Sequences


@dataclass(frozen=True)
class Layer:
    """What a layer's attention is.

    Attributes:
        config: which blocks it keeps; None keeps all.
        scale: factor on the dot products.
        window: how many keys a query sees at most, its own among them. Where it is shorter than the keys it is
            attended exactly, without a search.
        softcap: scores s become softcap · tanh(s / softcap), in the search too.
        sinks: [Hq], for each head the score of a further key whose value is zero.
    """

    config: PrefillConfig | None
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


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
    config = layer.config or PrefillConfig()
    window = layer.window if layer.window is not None and layer.window < key.shape[2] else None
    block_map = None
    if window is not None or layer.config is None:
        if window is None and layer.softcap is None and layer.sinks is None:
            return _attend_dense(query, key, value, layer.scale)
        block_map = all_blocks(query, key, config.block_size)
    elif lengths is not None:
        # their queries see no padding, which is behind them: the attention need not know of it
        sequences = Sequences.from_lengths(lengths, key.shape[2])
        block_map = search_blocks(query, key, config, scale=layer.scale, sequences=sequences, soft_cap=layer.softcap)
    return prefill_attention(
        query,
        key,
        value,
        config,
        block_map=block_map,
        scale=layer.scale,
        sliding_window=window,
        soft_cap=layer.softcap,
        sinks=layer.sinks,
    )


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if is_recording():
        note(all_blocks(query, key, PrefillConfig.block_size))
    request = Request.of(query, key, value, block_size=128, mods=False, scale=scale, lse=False, max_scores=False)
    choice = choose_dense(request, "the layer keeps all blocks")
    return dense_attention(query, key, value, scale=scale, kernel=choice.name)
