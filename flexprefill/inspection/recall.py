"""What a map does to attention: the exact mass that its blocks hold."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.map import BlockMap, check_block_map
from flexprefill.runtime.progress import Advance, asked_stage
from flexprefill.variant.inputs import check_attention_inputs, resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN


def attention_recall(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    rows: Iterable[int] | None = None,
    progress: bool | Advance | None = None,
) -> Tensor:
    """The share of the exact causal attention mass that the kept blocks hold, averaged over the query rows.

    It evaluates the attention of these rows in float32, one query block of one batch entry and key head at a time.

    Args:
        query, key: as in :func:`search_blocks`.
        block_map: [B, Hq, M, N] of these lengths.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        rows: only these queries, 0 … q_len - 1, such as ``range(0, q_len, 1000)``, since all queries of a long
            prompt take long; all if None.
        progress: True shows a bar on stderr (with tqdm, else a line); a function is called with 1 after each query
            block of each key head, B · Hkv · M times if all rows take part, and fewer where some query blocks hold
            none of them.

    Returns:
        float32 [B, Hq], in 0 … 1.

    Raises:
        TypeError, ValueError: the tensors or the map do not fit together, or ``rows`` are none or no queries.
    """
    check_attention_inputs(query, key)
    check_block_map(block_map, query, key)
    attention = PlainAttention(query, key, resolve_scale(scale, query.shape[3]), PLAIN)
    (batch, heads, q_len, _), geometry, group = query.shape, block_map.geometry, attention.group
    chosen = torch.arange(q_len, device="cpu") if rows is None else _row_tensor(rows, q_len)
    block_of = chosen // geometry.block_size
    row_blocks = [(block, chosen[block_of == block]) for block in block_of.unique().tolist()]
    kept_mass = torch.zeros(batch, heads, device=query.device, dtype=torch.float32)
    with asked_stage(progress, "attention mass", batch * key.shape[1] * len(row_blocks)) as advance:
        for b, head in product(range(batch), range(0, heads, group)):
            of_group = slice(head, head + group)
            for row_block, block_rows in row_blocks:
                end = geometry.offset + int(block_rows.max()) + 1  # keys from here on are in the future
                logits = attention.logits(slice(b, b + 1), of_group, block_rows.to(query.device), slice(0, end))[0]
                kept = unpack_bits(block_map.words[b, of_group, row_block], geometry.columns)
                kept = kept.repeat_interleave(geometry.block_size, -1)[:, None, :end]
                kept_mass[b, of_group] += (logits.softmax(-1) * kept).sum((-1, -2))  # of [g, rows, end]
                advance(1)
    return kept_mass / chosen.numel()


def _row_tensor(rows: Iterable[int], q_len: int) -> Tensor:
    """The rows as int64 [R] on the CPU, checked."""
    listed = rows.tolist() if isinstance(rows, Tensor) else list(rows) if isinstance(rows, Iterable) else [None]
    if not isinstance(listed, list) or not all(type(row) is int for row in listed):
        raise TypeError(f"rows must be a list of ints or None, got {rows!r}")
    if not listed or not 0 <= min(listed) <= max(listed) < q_len:
        raise ValueError(f"rows must be at least one of the queries 0 … {q_len - 1}, got {rows!r}")
    return torch.tensor(listed, device="cpu")
