"""Attention in plain PyTorch, float32, for what no kernel here does: soft caps and sinks in decoding and on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap, ceil_div, unpack_bits
from flexprefill.operators import operator


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Dense attention of some queries, all scores held at once.

    Args:
        query: [B, Hq, R, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv].
        mask: bool, True where a key is seen, or numbers to add to the scores; broadcast to [B, Hq, R, S]. None shows
            all keys.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [Hq], for each head the score of a further key whose value is zero.

    Returns:
        [B, Hq, R, Dv] of query's dtype; NaN where a query sees nothing and there are no sinks.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.float().repeat_interleave(group, 1) for tensor in (key, value))
    scores = scale * (query.float() @ key.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).to(query.dtype)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention over the blocks of a map, one query block at a time; one operator in a compiled graph.

    Args:
        query: [B, Hq, S_q, D], the last of the S_kv positions; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].
        window: how many keys a query sees at most, its own among them.
        scale, softcap, sinks: as in :func:`attend_rows`.

    Returns:
        [B, Hq, S_q, Dv] of query's dtype.
    """
    return _attend_words(query, key, value, block_map.words, block_map.block_size, scale, window, softcap, sinks)


@operator("flexprefill::attend_words")
def _attend_words(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    q_len, kv_len = query.shape[2], key.shape[2]
    offset, columns = kv_len - q_len, ceil_div(kv_len, block_size)
    outputs = []
    for I, start in enumerate(range(0, q_len, block_size)):
        rows = query[:, :, start : start + block_size]
        position = torch.arange(start, start + rows.shape[2], device=query.device)[:, None] + offset
        end = offset + start + rows.shape[2]  # keys from here on are in the future
        slot = torch.arange(end, device=query.device)
        seen = slot <= position
        if window is not None:
            seen = seen & (position - slot < window)
        kept = unpack_bits(words[:, :, I], columns).repeat_interleave(block_size, -1)[:, :, None, :end]
        seen_keys = key[:, :, :end], value[:, :, :end]
        outputs.append(attend_rows(rows, *seen_keys, kept & seen, scale=scale, softcap=softcap, sinks=sinks))
    return torch.cat(outputs, 2)


@torch.library.register_fake("flexprefill::attend_words")
def _(query, key, value, *_):
    return query.new_empty(*query.shape[:3], value.shape[3])
