"""Attention of one layer of a model: sparse by a search, exact over a sliding window, or dense; capped, with sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill.attention import all_blocks, prefill_attention
from flexprefill.backends import Request, choose_dense
from flexprefill.blockmap import BlockMap, causal_blocks
from flexprefill.checks import check_attention_inputs
from flexprefill.config import PrefillConfig
from flexprefill.dense import dense_attention
from flexprefill.flex import MaskMod
from flexprefill.integrations.plain import attend_blocks
from flexprefill.recording import is_recording, note
from flexprefill.search import search_blocks


@dataclass(frozen=True)
class Layer:
    """What a layer's attention is.

    Attributes:
        config: which blocks it keeps; None keeps all.
        scale: factor on the dot products.
        window: how many keys a query sees at most, its own among them. Where it is shorter than the keys it is
            attended exactly, without a search.
        softcap: scores s become softcap · tanh(s / softcap); the search does not know of it.
        sinks: [Hq], for each head the score of a further key whose value is zero; the search does not know of it.
    """

    config: PrefillConfig | None
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend_layer(query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
    """Causal attention of the last S_q of S_kv positions.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].

    Returns:
        [B, Hq, S_q, Dv].

    Raises:
        TypeError, ValueError: as :func:`flexprefill.prefill_attention`.
    """
    check_attention_inputs(query, key, value)
    block_map, mask_mod = None, None
    if layer.window is not None and layer.window < key.shape[2]:
        block_map, mask_mod = window_map(query, key, layer), window_mask(query, key, layer.window)
    elif layer.config is None:
        if layer.softcap is None and layer.sinks is None:
            return _attend_dense(query, key, value, layer.scale)
        block_map = all_blocks(query, key, PrefillConfig.block_size)
    if layer.sinks is not None:
        return _attend_with_sinks(query, key, value, layer, block_map, mask_mod)
    return _attend(query, key, value, layer, block_map, mask_mod)


def window_map(query: Tensor, key: Tensor, layer: Layer) -> BlockMap:
    """The blocks that a sliding window crosses, for all heads."""
    size = (layer.config or PrefillConfig()).block_size
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = causal_blocks(q_len, kv_len, size, query.device)
    first_row = torch.arange(causal.shape[0], device=query.device)[:, None] * size + (kv_len - q_len)
    last_key = torch.arange(1, causal.shape[1] + 1, device=query.device) * size - 1
    crossed = causal & (first_row - last_key < layer.window)
    dense = crossed.expand(*query.shape[:2], -1, -1)
    return BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=size)


def window_mask(query: Tensor, key: Tensor, window: int) -> MaskMod:
    """mask_mod of a sliding window."""
    # a tensor filled on the device: a number would be compiled anew for each value, a copy would wait
    behind = key.shape[2] - query.shape[2] - window
    floor = torch.full((query.shape[0],), behind, dtype=torch.int32, device=query.device)

    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx > q_idx + floor[b]

    return within_window


def soft_cap(query: Tensor, cap: float) -> Callable[..., Tensor]:
    """score_mod of a soft cap."""
    # a tensor: of a second number torch.compile makes a symbol, which FlexAttention cannot be compiled with
    caps = torch.full((query.shape[1],), cap, dtype=torch.float32, device=query.device)
    if not torch.compiler.is_compiling():
        # once other models had other heads torch makes them a symbol, of which its C++ attention does not compile
        torch._dynamo.mark_static(caps, 0)

    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return caps[h] * torch.tanh(score / caps[h])

    return capped


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Layer,
    block_map: BlockMap | None,
    mask_mod: MaskMod | None,
    return_aux: AuxRequest | None = None,
) -> Tensor:
    return prefill_attention(
        query,
        key,
        value,
        layer.config or PrefillConfig(),
        block_map=block_map,
        mask_mod=mask_mod,
        score_mod=None if layer.softcap is None else soft_cap(query, layer.softcap),
        scale=layer.scale,
        return_aux=return_aux,
    )


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, layer: Layer, block_map: BlockMap | None, mask_mod: MaskMod | None
) -> Tensor:
    if query.is_cuda:
        output, aux = _attend(query, key, value, layer, block_map, mask_mod, AuxRequest(lse=True))
        # the keys' share of a softmax that the sink takes part in
        share = torch.sigmoid(aux.lse - layer.sinks.float()[:, None])
        return (output * share[..., None]).to(query.dtype)
    # FlexAttention gives no log-sum-exp on the CPU
    if block_map is None:
        block_map = search_blocks(query, key, layer.config, scale=layer.scale)
    note(block_map)
    return attend_blocks(
        query,
        key,
        value,
        block_map,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
        sinks=layer.sinks,
    )


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if is_recording():
        note(all_blocks(query, key, PrefillConfig.block_size))
    request = Request.of(query, key, value, block_size=128, mods=False, scale=scale, lse=False, max_scores=False)
    choice = choose_dense(request, "the layer keeps all blocks")
    return dense_attention(query, key, value, scale=scale, kernel=choice.name)
