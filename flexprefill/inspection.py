"""What a map does to attention, in numbers: the exact mass that its blocks hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap
from flexprefill.checks import check_attention_inputs, check_block_map, resolve_scale


def attention_recall(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The share of the exact causal attention mass that the kept blocks hold, averaged over the query rows.

    It evaluates the whole attention in float32, one query block of one batch entry and key head at a time.

    Args:
        query, key: as in :func:`search_blocks`.
        block_map: [B, Hq, M, N] of these lengths.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        progress: called with 1 after each query block of each key head, B · Hkv · M times.

    Returns:
        float32 [B, Hq], in 0 … 1.

    Raises:
        TypeError, ValueError: the tensors or the map do not fit together.
    """
    check_attention_inputs(query, key)
    check_block_map(block_map, query, key)
    batch, heads, q_len, _ = query.shape
    kv_len, kv_heads = key.shape[2], key.shape[1]
    scale = resolve_scale(scale, query.shape[3])
    size, group = block_map.block_size, heads // kv_heads
    dense = block_map.to_dense().unflatten(1, (kv_heads, group))  # [B, Hkv, g, M, N]
    grouped = query.unflatten(1, (kv_heads, group))
    column = torch.arange(kv_len, device=key.device)
    kept_mass = torch.zeros(batch, kv_heads, group, device=query.device, dtype=torch.float32)
    for b in range(batch):
        for head in range(kv_heads):
            keys = key[b, head].float()
            for row_block, start in enumerate(range(0, q_len, size)):
                rows = torch.arange(start, min(start + size, q_len), device=query.device)
                end = block_map.offset + rows.shape[0] + start  # keys from here on are in the future
                logits = scale * (grouped[b, head, :, rows].float() @ keys[:end].T)  # [g, rows, end]
                visible = column[:end] <= (rows + block_map.offset)[:, None]
                mass = torch.where(visible, logits, -torch.inf).softmax(-1)
                kept = dense[b, head, :, row_block].repeat_interleave(size, -1)[:, :end]  # [g, end]
                kept_mass[b, head] += (mass * kept[:, None]).sum((-1, -2))
                if progress is not None:
                    progress(1)
    return (kept_mass / q_len).flatten(1)
