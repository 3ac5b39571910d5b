"""How other published methods choose blocks, in plain PyTorch: for comparisons, not for speed.

Each has scores, by which it can choose as many blocks as another method, and a rule of its own. All take a plain causal
prompt: as many queries as keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.geometry import causal_blocks
from flexprefill.search.grid import Grid
from flexprefill.search.reference import pool_keys
from flexprefill.search.scorers import antidiagonal_scores, exact_scores
from flexprefill.variant.logits import PlainAttention, float_products

EXACT_SHARE = 0.01  # of a row's mass, which a block has to hold on average over its rows
XATTENTION_SHARE = 0.9  # threshold of the paper's experiments
PRISM_SHARE, PRISM_HIGH, PRISM_LOW = 0.95, 1 / 2, 3 / 4  # of a band's mass; the bands' parts of a head's dimensions
# MInference's vertical-and-slash setting for Llama: lines, rows that vote, and lines that are always kept
VERTICALS, SLASHES, VOTING_ROWS, FIRST_VERTICALS, FIRST_SLASHES = 1000, 6096, 64, 30, 100
GAMMA, TAU, LEAST_TOKENS = 0.95, 0.1, 1024  # FlexPrefill's share, divergence and budget


@dataclass(frozen=True)
class Selection:
    """A method's choice of blocks.

    Attributes:
        scores: (query [B, Hq, S, D], key [B, Hkv, S, D], grid) to float32 [B, Hq, M, M]; more is wanted more.
        keep: the same to bool [B, Hq, M, M], the causal blocks that its own rule keeps.
        source: where the method comes from.
    """

    scores: Callable[[Tensor, Tensor, Grid], Tensor]
    keep: Callable[[Tensor, Tensor, Grid], Tensor]
    source: str


def best_that_reach(shares: Tensor, share: float, first: Tensor | None = None) -> Tensor:
    """The smallest number of the largest shares whose sum reaches ``share``: [..., N] to bool [..., N].

    What is set in ``first``, bool of a shape that expands to that of the shares, is counted before the others.
    """
    order = (shares if first is None else shares.masked_fill(first, torch.inf)).argsort(-1, descending=True)
    ordered = shares.gather(-1, order)
    enough_before = ordered.cumsum(-1) - ordered >= share
    return torch.empty_like(enough_before).scatter_(-1, order, ~enough_before)


def exact_keep(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """Blocks that hold a share of their rows' exact attention mass on average, and :func:`first_and_own`."""
    return _shares_of(exact_scores(query, key, grid)).ge(EXACT_SHARE) | first_and_own(grid, query.device)


def xattention_keep(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """:func:`first_and_own`, and the fewest others with which they hold a share of their row's antidiagonals.

    (arXiv 2503.16428)
    """
    shares = _shares_of(antidiagonal_scores(query, key, grid))
    return _causal(best_that_reach(shares, XATTENTION_SHARE, first_and_own(grid, query.device)), grid)


def prism_bands(query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Prism's shares by the fast and by the slow rotary dimensions of pooled queries and keys (arXiv 2602.08426).

    Each band's softmax has a temperature of the band's root mean squares relative to those of all dimensions. The
    dimensions are rotary pairs of i and i + D / 2, fast ones first.

    Returns:
        Two of float32 [B, Hq, M, M], 0 where a block is not causal.
    """
    dim = query.shape[3]
    queries, keys = _pooled(query, key, grid)
    hidden = ~causal_blocks(grid.geometry, query.device)
    bands = []
    for part, slow in ((PRISM_HIGH, False), (PRISM_LOW, True)):
        pairs = round(part * dim / 2)
        first = dim // 2 - pairs if slow else 0
        chosen = [*range(first, first + pairs), *range(first + dim // 2, first + dim // 2 + pairs)]
        own_queries, own_keys = queries[..., chosen], keys[..., chosen]
        energy = (_rms(own_queries) / _rms(queries)) * (_rms(own_keys) / _rms(keys))
        temperature = energy * len(chosen) / (dim * grid.scale)
        logits = float_products(own_queries, own_keys.mT) / temperature
        bands.append(logits.masked_fill(hidden, -torch.inf).softmax(-1))
    return bands[0], bands[1]


def prism_scores(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """The larger of a block's shares in the two bands."""
    return torch.maximum(*prism_bands(query, key, grid))


def prism_keep(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """The fewest blocks that hold a share of a band's mass, of both bands together."""
    fast, slow = (best_that_reach(band, PRISM_SHARE) for band in prism_bands(query, key, grid))
    return _causal(fast | slow, grid)


def vertical_slash_scores(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """What the last rows give to a block's columns and to its diagonals: the mass of MInference's two patterns."""
    columns, distances = _last_rows_mass(query, key, grid, VOTING_ROWS)
    return _on_lines(_block_sums(columns, grid), _block_sums(distances, grid), grid)


def minference_keep(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """The blocks that MInference's vertical and slash lines meet (arXiv 2407.02490)."""
    columns, distances = _last_rows_mass(query, key, grid, VOTING_ROWS)
    columns[..., :FIRST_VERTICALS] = torch.inf
    distances[..., :FIRST_SLASHES] = torch.inf
    chosen_columns = _largest(columns, VERTICALS)
    chosen_distances = _largest(distances, SLASHES)
    # a line of a distance that is no multiple of the block size meets two diagonals of blocks
    meets_next = chosen_distances & (torch.arange(grid.kv_len, device=query.device) % grid.block_size > 0)
    slashes = _block_sums(chosen_distances.float(), grid) > 0
    slashes[..., 1:] |= _block_sums(meets_next.float(), grid)[..., :-1] > 0
    verticals = _block_sums(chosen_columns.float(), grid) > 0
    return _causal(_on_lines(verticals.float(), slashes.float(), grid) > 0, grid)


def flexprefill_scores(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """Pooled attention where a head's last block resembles it, else what the last block gives to lines."""
    pooled = _pooled_shares(query, key, grid)
    columns, distances = (_block_sums(mass, grid) for mass in _last_rows_mass(query, key, grid, grid.block_size))
    aware = _is_query_aware(columns, pooled[:, :, -1])
    return torch.where(aware[..., None, None], pooled, _on_lines(columns, distances, grid))


def flexprefill_keep(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """FlexPrefill's vertical-slash or query-aware pattern for each head (ByteDance, arXiv 2502.20766)."""
    pooled = _pooled_shares(query, key, grid)
    columns, distances = _last_rows_mass(query, key, grid, grid.block_size)
    aware = _is_query_aware(_block_sums(columns, grid), pooled[:, :, -1])
    least = math.ceil(LEAST_TOKENS / grid.block_size)
    lines = []
    for mass in (columns, distances):
        needed = best_that_reach(mass, GAMMA).sum(-1) // grid.block_size + 1
        blocks = torch.where(aware, least, needed.clamp(min=least))
        sums = _block_sums(mass, grid)
        sums[..., 0] = torch.inf  # the first column and the diagonal
        lines.append(sums.argsort(-1, descending=True).argsort(-1) < blocks[..., None])
    keep = _on_lines(lines[0].float(), lines[1].float(), grid) > 0
    of_map = best_that_reach(pooled.flatten(2) / grid.rows, GAMMA).unflatten(2, (grid.rows, grid.columns))
    return _causal(keep | (of_map & aware[..., None, None]), grid)


def first_and_own(grid: Grid, device: torch.device | str) -> Tensor:
    """The first key block and each query block's own, which these methods always keep: bool [M, M]."""
    own = torch.eye(grid.rows, dtype=torch.bool, device=device)
    own[:, 0] = True
    return own


def _causal(keep: Tensor, grid: Grid) -> Tensor:
    return (keep | first_and_own(grid, keep.device)) & causal_blocks(grid.geometry, keep.device)


def _shares_of(L: Tensor) -> Tensor:
    """log2 sums of shares over a block's rows to mean shares, which sum to 1 in each row of blocks."""
    return (L * math.log(2)).softmax(-1)


def _pooled(query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Block means of queries and keys, one key head for each query head: float32 [B, Hq, M, D] twice."""
    queries, keys = (pool_keys(tensor.float(), grid.block_size) for tensor in (query, key))
    return queries, keys.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _pooled_shares(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    queries, keys = _pooled(query, key, grid)
    logits = grid.scale * float_products(queries, keys.mT)
    return logits.masked_fill(~causal_blocks(grid.geometry, query.device), -torch.inf).softmax(-1)


def _is_query_aware(exact: Tensor, pooled: Tensor) -> Tensor:
    """Whether the last block's pooled attention resembles its exact one: [B, Hq, M] twice to bool [B, Hq]."""
    middle = (exact + pooled) / 2
    # 0 · log 0 is 0
    divergence = sum(torch.special.xlogy(part, part / middle).nan_to_num(0).sum(-1) / 2 for part in (exact, pooled))
    assert isinstance(divergence, Tensor)
    return divergence.clamp(min=0).sqrt() < TAU


def _last_rows_mass(query: Tensor, key: Tensor, grid: Grid, rows: int) -> tuple[Tensor, Tensor]:
    """What the last rows give to each key and to each distance, on average: float32 [B, Hq, S] twice."""
    length, rows = grid.kv_len, min(rows, grid.q_len)
    attention = PlainAttention(query, key, grid.scale, grid.variant)
    everything = slice(0, query.shape[0]), slice(0, query.shape[1])
    weights = attention.logits(*everything, slice(length - rows, length), slice(0, length)).softmax(-1)
    position = torch.arange(length - rows, length, device=query.device)[:, None]
    at_distance = position - torch.arange(length, device=query.device)
    by_distance = weights.gather(-1, at_distance.clamp(min=0).expand_as(weights)) * (at_distance >= 0)
    return weights.mean(2), by_distance.mean(2)


def _block_sums(mass: Tensor, grid: Grid) -> Tensor:
    """[..., S] to [..., M]."""
    missing = grid.columns * grid.block_size - mass.shape[-1]
    return pad(mass, (0, missing)).unflatten(-1, (-1, grid.block_size)).sum(-1)


def _on_lines(columns: Tensor, distances: Tensor, grid: Grid) -> Tensor:
    """Sums of what a block's column and its diagonal have: [..., M] twice to [..., M, M]."""
    block = torch.arange(grid.rows, device=columns.device)
    apart = (block[:, None] - block).clamp(min=0)
    return columns[..., None, :] + distances[..., apart]


def _largest(mass: Tensor, count: int) -> Tensor:
    """The ``count`` largest: [..., S] to bool [..., S]."""
    chosen = mass.topk(min(count, mass.shape[-1]), -1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen, True)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean((-2, -1), keepdim=True).sqrt()


SELECTIONS = {
    "exact": Selection(exact_scores, exact_keep, "the attention mass itself"),
    "xattention": Selection(antidiagonal_scores, xattention_keep, "XAttention, arXiv 2503.16428"),
    "prism": Selection(prism_scores, prism_keep, "Prism, arXiv 2602.08426"),
    "minference": Selection(vertical_slash_scores, minference_keep, "MInference, arXiv 2407.02490"),
    "byte-flexprefill": Selection(flexprefill_scores, flexprefill_keep, "ByteDance's FlexPrefill, arXiv 2502.20766"),
}
