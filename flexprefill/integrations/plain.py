"""Attention in plain PyTorch, float32, for what no kernel here does: soft caps and sinks in decoding and on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap, unpack_bits


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
    """Causal attention over the blocks of a map, one query block at a time.

    Args:
        query: [B, Hq, S_q, D], the last of the S_kv positions; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].
        window: how many keys a query sees at most, its own among them.
        scale, softcap, sinks: as in :func:`attend_rows`.

    Returns:
        [B, Hq, S_q, Dv] of query's dtype.
    """
    size, columns = block_map.block_size, block_map.shape[3]
    outputs = []
    for I, start in enumerate(range(0, block_map.q_len, size)):
        rows = query[:, :, start : start + size]
        position = torch.arange(start, start + rows.shape[2], device=query.device)[:, None] + block_map.offset
        end = block_map.offset + start + rows.shape[2]  # keys from here on are in the future
        slot = torch.arange(end, device=query.device)
        seen = slot <= position
        if window is not None:
            seen = seen & (position - slot < window)
        kept = unpack_bits(block_map.words[:, :, I], columns).repeat_interleave(size, -1)[:, :, None, :end]
        seen_keys = key[:, :, :end], value[:, :, :end]
        outputs.append(attend_rows(rows, *seen_keys, kept & seen, scale=scale, softcap=softcap, sinks=sinks))
    return torch.cat(outputs, 2)
