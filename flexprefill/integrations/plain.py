"""Attention in plain PyTorch, float32, for what no kernel here does: soft caps and sinks in decoding and on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


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
