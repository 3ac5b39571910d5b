"""Query rows of an attention: which are measured, and their exact weights over the keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.map import BlockMap
from flexprefill.runtime.memory import PIECE
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.visibility import first_keys

SAMPLED_ROWS = 256  # of each head, where the caller does not say
Rows = int | Iterable[int] | None

ROWS_AT_A_TIME = 512  # query blocks whose dropped blocks are counted together


def check_rows(rows: Rows, q_len: int) -> int | Tensor | None:
    """A number of rows, these rows as int64 [R] on the CPU, or None for all; raises unless they are queries."""
    if rows is None:
        return None
    if type(rows) is int:
        if rows < 1:
            raise ValueError(f"rows must be at least 1 row to sample, got {rows}")
        return rows
    listed = rows.tolist() if isinstance(rows, Tensor) else list(rows) if isinstance(rows, Iterable) else [None]
    if not isinstance(listed, list) or not all(type(row) is int for row in listed):
        raise TypeError(f"rows must be a number of rows, a list of ints or None, got {rows!r}")
    if not listed or not 0 <= min(listed) <= max(listed) < q_len:
        raise ValueError(f"rows must be at least one of the queries 0 … {q_len - 1}, got {rows!r}")
    return torch.tensor(listed, device="cpu")


def check_seed(seed: int) -> int:
    """The seed; raises unless it is one."""
    if type(seed) is not int:
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    return seed


def sample_rows(rows: Tensor, count: int | None, seed: int) -> Tensor:
    """So many of some rows, one drawn from each of equal stretches of them; all if they are no more, or for None."""
    if count is None or rows.numel() <= count:
        return rows
    generator = torch.Generator("cpu").manual_seed(seed)
    within = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    places = (torch.arange(count, device="cpu") + within) * (rows.numel() / count)
    return rows[places.long().clamp(max=rows.numel() - 1)]


def first_seen(attention: PlainAttention, geometry: Geometry, batch: int) -> Tensor:
    """The first key that each query sees, S_kv for one that sees none: int64 [S_q]."""
    variant = attention.variant
    first = first_keys(variant.sequences, variant.sliding_window, geometry, attention.query.device)
    if first is None:
        return torch.zeros(geometry.q_len, dtype=torch.int64, device=attention.query.device)
    return first[batch if first.shape[0] > 1 else 0].long()


def rows_that_can_lose(block_map: BlockMap, batch: int, head: int, first: Tensor) -> Tensor:
    """The queries of a head that see a key in a block that it drops: int64 [n] on the CPU, ascending.

    Args:
        first: the first key that each query sees, int64 [S_q].
    """
    (q_len, _, size), device = block_map.geometry, block_map.device
    found = []
    for start in range(0, block_map.shape[2], ROWS_AT_A_TIME):
        words = block_map.words[batch, head, start : start + ROWS_AT_A_TIME]
        dropped = ~unpack_bits(words, block_map.shape[3])
        before = torch.nn.functional.pad(dropped.cumsum(1, dtype=torch.int32), (1, 0))  # dropped before each block
        rows = torch.arange(start * size, min((start + words.shape[0]) * size, q_len), device=device)
        position, begin = rows + block_map.offset, first[rows]
        rows, position, begin = (tensor[begin <= position] for tensor in (rows, position, begin))
        own = rows // size - start
        found.append(rows[before[own, position // size + 1] > before[own, begin // size]].cpu())
    return torch.cat(found)


def exact_weights(
    attention: PlainAttention, batch: int, head: int, rows: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The attention weights of some rows of a head, in pieces that fit into memory.

    Args:
        rows: int64 [R] on the CPU.

    Yields:
        which of the rows; these rows as int64 [r] on the device; their weights over the first K keys, float32 [r, K],
        where no row sees more. The weights of a row that sees no key are 0.
    """
    offset = attention.key.shape[2] - attention.query.shape[2]
    step = max(1, PIECE // attention.key.shape[2])
    for start in range(0, rows.numel(), step):
        piece = rows[start : start + step]
        own, keys = piece.to(attention.query.device), slice(0, offset + int(piece.max()) + 1)
        logits = attention.logits(slice(batch, batch + 1), slice(head, head + 1), own, keys)[0, 0]
        sees_none = logits.amax(-1, keepdim=True) == -torch.inf
        yield slice(start, start + piece.numel()), own, logits.softmax(-1).masked_fill(sees_none, 0)
