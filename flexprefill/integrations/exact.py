"""Exact attention under any mask, of any floating dtype and head dimension, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap.masking import MaskMod
from flexprefill.variant.inputs import check_no_gradients
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.mods import ScoreMod
from flexprefill.variant.variant import AttentionVariant


def attend_exactly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    variant: AttentionVariant,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax over all visible keys.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        value: [B, Hkv, S_kv, Dv].
        causal: Whether the queries are the last of the keys' positions, and see the keys up to their own. If not, the
            variant must have no window and no sequences.
        mask: Bools, or numbers to add to the scores, broadcast to [B, Hq, S_q, S_kv]. None shows everything.

    Returns:
        [B, Hq, S_q, Dv] of query's dtype, zeros where a query sees nothing.

    Raises:
        ValueError: A gradient is asked for.
    """
    check_no_gradients(query=query, key=key, value=value)
    mask_mods: tuple[MaskMod, ...] = ()
    score_mods: tuple[ScoreMod, ...] = ()
    if mask is not None:
        whole = mask.expand(*query.shape[:3], key.shape[2])
        if mask.dtype == torch.bool:
            mask_mods = (lambda b, h, q_idx, kv_idx: whole[b, h, q_idx, kv_idx],)
        else:
            score_mods = (lambda score, b, h, q_idx, kv_idx: score + whole[b, h, q_idx, kv_idx],)
    attention = PlainAttention(query, key, scale, variant, mask_mods, score_mods, causal)
    return attention.attend(value)[0].to(query.dtype)
