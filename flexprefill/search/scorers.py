"""The scoring step by name: functions from queries and pooled keys to log-scores.

A scorer says how much each query block wants each key block. Sinks, window, alpha and the rest of the rule are the same
for all scorers, so methods can be compared on one engine. FlashPrefill's scorer has kernels. The others are plain
PyTorch on any device, in pieces that bound the memory. They are slow and meant for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.config import CHOICES, SCORERS, check_name
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.state import registered
from flexprefill.search import reference
from flexprefill.search.grid import Grid
from flexprefill.variant.logits import LOG2_E, PlainAttention, log2_sum
from flexprefill.variant.variant import PLAIN

MEANS_SCORER = "flashprefill"  # it pools keys to their blocks' means, and has kernels
STRIDE = 16  # XAttention's; the paper's choice


@dataclass(frozen=True)
class Scorer:
    """A scoring step.

    Attributes:
        pool: Takes (key [B, Hkv, S_kv, D], block_size). Gives what scores are made of, [B, Hkv, ...].
        log_scores: Takes (query [B, Hq, S_q, D], what ``pool`` gave, Grid). Gives float32 [B, Hq, M, N], log2 of how
            much query block I wants key block J. Only differences within a row of blocks count. It is -inf where
            ``grid.scored`` says that there is no score. Any other score that is not finite keeps its block.
        source: Where the method comes from.
        score_rows: Which rows score a block, "whole" or "visible" (see PrefillConfig), if the method itself says so.
            None leaves it to the config.
        knows_variant: Whether ``log_scores`` follows the grid's variant: sequences, sliding window, soft cap and ALiBi.
            A scorer that does not is refused where these are given.
    """

    pool: Callable[[Tensor, int], Tensor]
    log_scores: Callable[[Tensor, Tensor, Grid], Tensor]
    source: str
    score_rows: str | None = None
    knows_variant: bool = False


def register_scorer(name: str, scorer: Scorer) -> None:
    """Makes a scoring step known as ``PrefillConfig(scorer=name)``, in this process.

    Args:
        name: A printable name that is not taken.
        scorer: The scoring step.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The name is taken, or the scorer's ``score_rows`` is no known setting.
    """
    check_name("name", name)
    if not isinstance(scorer, Scorer):
        raise TypeError(f"scorer must be a Scorer, got {type(scorer).__name__}")
    for part in ("pool", "log_scores"):
        if not callable(getattr(scorer, part)):
            raise TypeError(f"scorer.{part} must be a function, got {type(getattr(scorer, part)).__name__}")
    known = CHOICES["score_rows"]
    if scorer.score_rows not in (None, *known):
        raise ValueError(f"scorer.score_rows must be None or one of {known}, got {scorer.score_rows!r}")
    if name in SCORERS or SCORERS.setdefault(name, scorer) is not scorer:
        raise ValueError(f"name {name!r} is taken; registered are {list(SCORERS)}")


def find_scorer(name: str) -> Scorer:
    """The scoring step of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in SCORERS:
        raise ValueError(
            f"config.scorer must be one of {list(SCORERS)}, got {name!r}; register_scorer makes another one known"
        )
    return SCORERS[name]


def antidiagonal_scores(query: Tensor, key: Tensor, grid: Grid, stride: int = STRIDE) -> Tensor:
    """XAttention's score: the antidiagonals' share of a softmax, summed over the block (arXiv 2503.16428).

    Queries and keys are taken in groups of ``stride``, counted from the first of each. Two groups make a square of
    products. Their logit is scale / stride times the sum along its antidiagonal, (stride - 1 - i, i) for
    i = 0 … stride - 1. What a short last group lacks counts as zero. A group of queries takes the softmax over the
    groups of keys that start at or before its last row. A block's score is log2 of its sum of shares.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        grid: Its block size is a multiple of ``stride``.
        stride: Rows of a group.

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
    """The exact attention mass of each block. A perfect search would go by it. It is slow and meant for evaluation.

    It is log2 of the sum of softmax(scale · query · key) over the rows of I and the keys of J. The softmax of a row is
    over all keys that it sees: those up to its own position, as far as sequences and a sliding window let it see them.
    A soft cap and ALiBi are part of the logits.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        grid: The blocks to score.

    Returns:
        float32 [B, Hq, M, N].
    """
    return _block_shares(PlainAttention(query, key, grid.scale, grid.variant), grid, grid.block_size)


def _groups(tensor: Tensor, stride: int) -> Tensor:
    """[B, H, S, D] to [B, H, ceil(S / stride), stride, D], zeros behind the end."""
    return pad(tensor, (0, 0, 0, -tensor.shape[2] % stride)).unflatten(2, (-1, stride))


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
            # in logs, because a share that underflows would be no score
            by_block = log2_sum(logits.unflatten(2, (columns, per_block)), 3)  # [g, rows, N]
            total = log2_sum(by_block, 2)[..., None]
            # a row of padding has no keys and no share
            shares = by_block - torch.where(total == -torch.inf, 0, total)
            padded = pad(shares, (0, 0, 0, missing_rows), value=-torch.inf)
            summed = log2_sum(padded.unflatten(1, (-1, per_block)), 2)
            L[b, of_group, block : block + blocks_a_piece] = summed
    return L


def _keys_themselves(key: Tensor, block_size: int) -> Tensor:
    return key


OWN_SCORERS = {
    MEANS_SCORER: Scorer(reference.pool_keys, reference.log_scores, "FlashPrefill, arXiv 2603.06199", None, True),
    "xattention": Scorer(_keys_themselves, antidiagonal_scores, "XAttention, arXiv 2503.16428", "visible"),
    "exact": Scorer(_keys_themselves, exact_scores, "the attention mass itself", "visible", True),
}


def _reset_scorers() -> None:
    SCORERS.clear()
    SCORERS.update(OWN_SCORERS)


_reset_scorers()
registered("registered scorers", _reset_scorers)
