"""Attention of one layer of a model: sparse by a search, exact over a sliding window, or dense."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill.attention.backends import Request, choose_dense
from flexprefill.attention.dense import dense_attention
from flexprefill.attention.prefill import prefill_attention
from flexprefill.blockmap.block_mask import cut_by
from flexprefill.blockmap.map import BlockMap, all_blocks
from flexprefill.config import PrefillConfig
from flexprefill.integrations.exact import attend_exactly
from flexprefill.runtime.compiling import constant_in_graphs
from flexprefill.runtime.listeners import is_recording, note, note_attention
from flexprefill.runtime.state import remembered
from flexprefill.search.blocks import search_blocks
from flexprefill.search.defaults import default_config
from flexprefill.variant.inputs import DTYPES, HEAD_DIMS, Layout, check_attention_inputs, check_no_gradients
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.mods import hiding_masks
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import PLAIN, AttentionVariant

logger = logging.getLogger("flexprefill")


@dataclass(frozen=True)
class Layer:
    """What a layer's attention is.

    Attributes:
        config: Which blocks it keeps; None keeps all.
        elsewhere: If ``config`` is the default, the setting where the two-sided search cannot look. Else None.
        scale: Factor on the dot products.
        variant: What the attention is besides causal. A window shorter than the keys is attended exactly, without a
            search. Prompts that are packed in a row are its sequences.
        kind: The name of the layer and its model, for the log.
    """

    config: PrefillConfig | None
    scale: float
    variant: AttentionVariant = PLAIN
    kind: str = "layer"
    elsewhere: PrefillConfig | None = None


def attend_layer(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    *,
    last_chunk: bool = True,
) -> Tensor:
    """Causal attention of the last S_q of S_kv positions.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        value: [B, Hkv, S_kv, Dv].
        lengths: int32 [B], how many of the positions hold tokens. The others stand behind them, are padding and have to
            be finite. None: all positions hold tokens.
        last_chunk: Whether these queries end the prompt, as far as that is known.

    Returns:
        [B, Hq, S_q, Dv]. Rows of padding may hold anything.

    Raises:
        TypeError, ValueError: As prefill_attention.
    """
    variant, scale = layer.variant.over(key.shape[2]), layer.scale
    config = layer.config or PrefillConfig()
    if layer.elsewhere is not None:
        config = default_config(variant, elsewhere=layer.elsewhere)
    searches = variant.sliding_window is None and layer.config is not None
    dims = operator.index(query.shape[3]), operator.index(value.shape[3])
    has_kernels = query.dtype in DTYPES and all(dim in HEAD_DIMS for dim in dims)
    if not has_kernels and (not searches or max(dims) > HEAD_DIMS[-1]):
        if searches:
            _say_dense(layer.kind, *dims)
        return _attend_exactly(query, key, value, scale, variant)
    block_map = None
    if not searches:
        layout = check_attention_inputs(query, key, value)
        if variant == PLAIN:
            return _attend_dense(query, key, value, scale, layout)
        block_map = all_blocks(query, key, config.block_size)
    elif lengths is not None:
        check_attention_inputs(query, key, value)
        # padding is behind all tokens, so no query sees it: only the search needs to know
        block_map = _search_padded(query, key, config, variant, scale, lengths, last_chunk)
    return prefill_attention(
        query, key, value, config, variant=variant, block_map=block_map, scale=scale, last_chunk=last_chunk
    )


def _search_padded(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig,
    variant: AttentionVariant,
    scale: float,
    lengths: Tensor,
    last_chunk: bool,
) -> BlockMap:
    """The maps of prompts with padding behind them, as each prompt alone has it.

    The two-sided search takes no sequences. Nothing that it asks in a prompt's blocks depends on what stands behind,
    but for the last block, which the rule can keep whole.
    """
    if not (config.two_sided and last_chunk and config.last_full_blocks):
        padded = replace(variant, sequences=Sequences.from_lengths(lengths, key.shape[2]))
        return search_blocks(query, key, config, variant=padded, scale=scale, last_chunk=last_chunk)
    found = search_blocks(query, key, config, variant=variant, scale=scale, last_chunk=False)
    every = all_blocks(query, key, config.block_size)
    ends = (lengths + (query.shape[2] - key.shape[2]))[:, None, None, None]
    begins = torch.arange(found.shape[2], device=query.device)[None, None, :, None] * config.block_size
    full = (begins < ends) & (begins >= ends - config.last_full_blocks * config.block_size)
    return replace(found, words=torch.where(full, every.words, found.words))


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout | None) -> Tensor:
    if is_recording():
        note_attention(PlainAttention(query, key, scale, PLAIN))
        note(all_blocks(query, key, PrefillConfig.block_size))
    request = Request.of(query, key, value, block_size=128, mods="", scale=scale, aux=AuxRequest())
    choice = choose_dense(request, "the layer keeps all blocks")
    return dense_attention(query, key, value, scale=scale, kernel=choice.name, layout=layout)


def _attend_exactly(query: Tensor, key: Tensor, value: Tensor, scale: float, variant: AttentionVariant) -> Tensor:
    """Attention that no kernel of the search or of FlexAttention takes."""
    if is_recording():
        kept = all_blocks(query, key, PrefillConfig.block_size)
        words, _ = cut_by(kept.words, hiding_masks(variant, kept.words, kept.geometry))
        note_attention(PlainAttention(query, key, scale, variant))
        note(replace(kept, words=words))
    if variant == PLAIN:
        check_no_gradients(query=query, key=key, value=value)
        return dense_attention(query, key, value, scale=scale, kernel="dense-sdpa")
    return attend_exactly(query, key, value, scale, variant)


@constant_in_graphs
def _say_dense(kind: str, head_dim: int, value_dim: int) -> bool:
    return _say_dense_once(kind, head_dim, value_dim)


@remembered("layers that were said to be dense", most=256)
def _say_dense_once(kind: str, head_dim: int, value_dim: int) -> bool:
    logger.warning(
        "%s is dense: its head dimension D=%d, Dv=%d is above 256, the most that search and sparse attention take",
        kind,
        head_dim,
        value_dim,
    )
    return True
