"""The scoring step by name: functions from queries and pooled keys to log-scores, all with one rule behind them.

A scorer says how much each query block wants each key block. Sinks, window, alpha and the rest of the rule do not
depend on it, so that methods can be compared on one engine. FlashPrefill's has kernels; the others are plain PyTorch
on any device, in pieces that bound the memory, and slow: they are for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.config import SCORE_ROWS, SCORERS
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.state import registered
from flexprefill.search import reference
from flexprefill.search.grid import Grid
from flexprefill.variant.logits import LOG2_E, PlainAttention, log2_sum
from flexprefill.variant.variant import PLAIN

MEANS_SCORER = "flashprefill"  # the one whose pooled keys are their blocks' means, and which has kernels
STRIDE = 16  # XAttention's, the paper's choice


@dataclass(frozen=True)
class Scorer:
    """A scoring step.

    Attributes:
        pool: (key [B, Hkv, S_kv, D], block_size) to what scores are made of, [B, Hkv, ...].
        log_scores: (query [B, Hq, S_q, D], what ``pool`` gave, Grid) to float32 [B, Hq, M, N]: log2 of how much query
            block I wants key block J. Only differences within a row of blocks count. -inf where ``grid.scored`` says
            that there is no score; any other score that is not finite keeps its block.
        source: where the method comes from.
        score_rows: "whole" or "visible" (see PrefillConfig) where the method itself says which rows score a block; None
            leaves it to the config.
        knows_variant: whether ``log_scores`` heeds the grid's variant: sequences, sliding window, soft cap and ALiBi;
            one that does not is refused where these are given. With sequences, FlashPrefill's own keys are pooled by
            reference.pool_own_keys.
    """

    pool: Callable[[Tensor, int], Tensor]
    log_scores: Callable[[Tensor, Tensor, Grid], Tensor]
    source: str
    score_rows: str | None = None
    knows_variant: bool = False


def register_scorer(name: str, scorer: Scorer) -> None:
    """Makes a scoring step known as ``PrefillConfig(scorer=name)``, in this process.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the name is taken, or the scorer's ``score_rows`` are none.
    """
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise TypeError(f"name must be a string such as 'exact', got {name!r}")
    if not isinstance(scorer, Scorer):
        raise TypeError(f"scorer must be a Scorer, got {type(scorer).__name__}")
    for part in ("pool", "log_scores"):
        if not callable(getattr(scorer, part)):
            raise TypeError(f"scorer.{part} must be a function, got {type(getattr(scorer, part)).__name__}")
    if scorer.score_rows not in (None, *SCORE_ROWS):
        raise ValueError(f"scorer.score_rows must be None or one of {SCORE_ROWS}, got {scorer.score_rows!r}")
    if name in _SCORERS or _SCORERS.setdefault(name, scorer) is not scorer:
        raise ValueError(f"name {name!r} is taken; registered are {list(_SCORERS)}")
    SCORERS.add(name)


def find_scorer(name: str) -> Scorer:
    """The scoring step of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in _SCORERS:
        raise ValueError(
            f"config.scorer must be one of {list(_SCORERS)}, got {name!r}; register_scorer makes another one known"
        )
    return _SCORERS[name]


def antidiagonal_scores(query: Tensor, key: Tensor, grid: Grid, stride: int = STRIDE) -> Tensor:
    """XAttention's score: the antidiagonals' share of a softmax, summed over the block (arXiv 2503.16428).

    Queries and keys are taken in groups of ``stride``, counted from the first of each. The logit of two groups is the
    sum along the antidiagonal of their square of products, (stride - 1 - i, i) for i = 0 … stride - 1, times
    scale / stride; what a short last group lacks counts as zero. A group of queries takes the softmax over the groups
    of keys that start at or before its last row, and log2 of the block's sum of shares is its score.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D].
        grid: with a block size that is a multiple of ``stride``.

    Returns:
        float32 [B, Hq, M, N].
    """
    if grid.block_size % stride:
        raise ValueError(f"XAttention's score needs a block_size that is a multiple of {stride}, got {grid.block_size}")
    device = query.device
    queries = _groups(query, stride).flip(3).flatten(3)  # [B, Hq, groups, stride · D], each reversed
    keys = _groups(key, stride).flatten(3)
    last_rows = ((torch.arange(queries.shape[2], device=device) + 1) * stride).clamp(max=grid.q_len) - 1 + grid.offset

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx * stride <= last_rows[q_idx]

    attention = PlainAttention(queries, keys, grid.scale / stride, PLAIN, mask_mods=(sees,), causal=False)
    return _block_shares(attention, grid, grid.block_size // stride)


def exact_scores(query: Tensor, key: Tensor, grid: Grid) -> Tensor:
    """The exact attention mass of each block, which a perfect search would go by: slow, for evaluation.

    log2 of the sum of softmax(scale · query · key) over the rows of I and the keys of J, each row's softmax being over
    all keys up to its own position, or of these the ones that sequences and a sliding window let it see. A soft cap and
    ALiBi are part of the logits.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D].

    Returns:
        float32 [B, Hq, M, N].
    """
    return _block_shares(PlainAttention(query, key, grid.scale, grid.variant), grid, grid.block_size)


def _groups(tensor: Tensor, stride: int) -> Tensor:
    """[B, H, S, D] to [B, H, ceil(S / stride), stride, D], zeros behind the end."""
    length = tensor.shape[2]
    padded = pad(tensor, (0, 0, 0, ceil_div(length, stride) * stride - length))
    return padded.unflatten(2, (-1, stride))


def _block_shares(attention: PlainAttention, grid: Grid, per_block: int) -> Tensor:
    """log2 of the attention's weights, summed over blocks of ``per_block`` × ``per_block``: float32 [B, Hq, M, N]."""
    batch, heads, count, _ = attention.query.shape
    length, group, columns = attention.key.shape[2], attention.group, grid.columns
    L = torch.empty(batch, heads, grid.rows, columns, device=attention.query.device, dtype=torch.float32)
    blocks_a_piece = max(1, PIECE // (group * per_block * length))
    for block in range(0, grid.rows, blocks_a_piece):
        rows = slice(block * per_block, min((block + blocks_a_piece) * per_block, count))
        missing_rows = -(rows.stop - rows.start) % per_block
        for b, head in product(range(batch), range(0, heads, group)):
            of_group = slice(head, head + group)
            logits = LOG2_E * attention.logits(slice(b, b + 1), of_group, rows, slice(0, length))[0]
            logits = pad(logits, (0, columns * per_block - length), value=-torch.inf)
            # in logs: a share that underflows would be no score
            by_block = log2_sum(logits.unflatten(2, (columns, per_block)), 3)  # [g, rows, N]
            total = log2_sum(by_block, 2)[..., None]
            # a row of padding has no keys, and no share
            shares = by_block - torch.where(total == -torch.inf, 0, total)
            padded = pad(shares, (0, 0, 0, missing_rows), value=-torch.inf)
            summed = log2_sum(padded.unflatten(1, (-1, per_block)), 2)
            L[b, of_group, block : block + blocks_a_piece] = summed
    return L


def _keys_themselves(key: Tensor, block_size: int) -> Tensor:
    return key


_SCORERS = {
    MEANS_SCORER: Scorer(reference.pool_keys, reference.log_scores, "FlashPrefill, arXiv 2603.06199", None, True),
    "xattention": Scorer(_keys_themselves, antidiagonal_scores, "XAttention, arXiv 2503.16428", "visible"),
    "exact": Scorer(_keys_themselves, exact_scores, "the attention mass itself", "visible", True),
}


def _forget_scorers() -> None:
    for name in [name for name in _SCORERS if name not in _OWN]:
        del _SCORERS[name]
        SCORERS.discard(name)


_OWN = frozenset(_SCORERS)
registered("registered scorers", _forget_scorers)
