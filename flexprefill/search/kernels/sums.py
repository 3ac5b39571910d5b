"""Block scores: sums over the rows of a query block. A program keeps them in scratch rows until it has all."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexprefill.search.kernels.visibility import is_scored

LARGE = tl.constexpr(1e30)  # products below it are far from overflow in float32


class Scratch(NamedTuple):
    """A program's own scratch rows, one for each query block of each query head that shares a mask."""

    base: Any
    stride: Any  # of the query blocks
    member_stride: Any  # of the query heads
    columns: Any  # key blocks, so many scores in each row


@triton.jit
def shift_by(products, j0, base, qk_scale):
    """The largest score of each query block's block base. 0 if it is not in the tile from j0, or huge."""
    j = j0 + tl.arange(0, products.shape[0])
    shift = tl.max(tl.where(j[:, None] == base[None, :], tl.max(products * qk_scale, 2), float("-inf")), 0)
    return tl.where(tl.abs(shift) < LARGE, shift, 0.0)


@triton.jit
def no_sums(fixed):
    """The start of add_sums and add_log_sums: no best score, and none doubtful, [TILE, query blocks] both."""
    best = tl.full([fixed.TILE, fixed.QUERY_BLOCKS], float("-inf"), tl.float32)
    return best, tl.zeros([fixed.TILE, fixed.QUERY_BLOCKS], tl.int1)


@triton.jit
def add_sums(products, j0, shift, qk_scale, found, scratch, bounds, fixed):
    """Stores a tile's block scores relative to 2^shift. They are doubtful where that says too little."""
    best, doubtful = found
    j = j0 + tl.arange(0, fixed.TILE)
    sums = _sums(products, qk_scale, shift)
    best = _store(scratch, sums, j, j[:, None] < scratch.columns, best)
    scored = is_scored(j[:, None], bounds, fixed)
    return best, doubtful | (scored & ((sums == 0) | (sums == float("inf"))))


@triton.jit
def add_log_sums(products, j0, logs, qk_scale, best, scratch, fixed):
    """Stores log2 of a tile's block scores for the query blocks where logs is set."""
    j = j0 + tl.arange(0, fixed.TILE)
    inside = (j[:, None] < scratch.columns) & logs[None, :]
    return _store(scratch, _log_sums(products, qk_scale), j, inside, best)


@triton.jit
def best_of_group(scratch, logs, bounds, fixed):
    """The greatest finite scores of each query block [TILE, query blocks], and where the sums say too little."""
    best, doubtful = no_sums(fixed)
    for j0 in range(bounds.first_tile, bounds.most, fixed.TILE):
        scores, scored = _tile_scores(j0, scratch, float("-inf"), logs, bounds, fixed)
        best = tl.maximum(best, tl.where(tl.abs(scores) < float("inf"), scores, float("-inf")))
        doubtful = doubtful | (scored & ((scores == 0) | (scores == float("inf"))))
    return best, doubtful


@triton.jit
def kth_best(k, scratch, bounds, fixed):
    """The k-th best of the log2 scores of each query block, [query blocks]. -inf where it has no more than k.

    It steps down from one distinct value to the next, so equal scores count together.
    """
    kth = tl.full([fixed.QUERY_BLOCKS], float("inf"), tl.float32)
    count = tl.zeros([fixed.QUERY_BLOCKS], tl.int32)
    for _ in range(0, tl.where(bounds.most > k, k, 0)):
        below = tl.full([fixed.TILE, fixed.QUERY_BLOCKS], float("-inf"), tl.float32)
        for j0 in range(bounds.first_tile, bounds.most, fixed.TILE):
            L = _tile_scores(j0, scratch, float("-inf"), True, bounds, fixed)[0]
            is_below = (tl.abs(L) < float("inf")) & (kth[None, :] > L)
            below = tl.maximum(below, tl.where(is_below, L, float("-inf")))
        kth = tl.where(count < k, tl.max(below, 0), kth)
        equal = tl.zeros([fixed.TILE, fixed.QUERY_BLOCKS], tl.int32)
        for j0 in range(bounds.first_tile, bounds.most, fixed.TILE):
            L = _tile_scores(j0, scratch, float("nan"), True, bounds, fixed)[0]
            equal += (L >= kth[None, :]).to(tl.int32)
        count = tl.sum(equal, 0)
    return tl.where(bounds.scored > k, kth, float("-inf"))


@triton.jit
def load_scores(scratch, offsets, mask, other, logs, fixed):
    """Block scores of the query heads that share a mask, added: sums, or log2 of sums where logs is set."""
    scores = tl.load(scratch.base + offsets, mask=mask, other=other)
    for member in tl.static_range(1, fixed.MEMBERS):
        more = tl.load(scratch.base + member * scratch.member_stride + offsets, mask=mask, other=other)
        best = tl.maximum(scores, more)
        shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        log_sums = shift + tl.log2(tl.exp2(scores - shift) + tl.exp2(more - shift))
        scores = tl.where(logs, log_sums, scores + more)
    return scores


@triton.jit
def _tile_scores(j0, scratch, other, logs, bounds, fixed):
    """The block scores of the tile from j0, with other where there is none. Also where there is one."""
    j = j0 + tl.arange(0, fixed.TILE)
    scored = is_scored(j[:, None], bounds, fixed)
    offsets = tl.arange(0, fixed.QUERY_BLOCKS)[None, :] * scratch.stride + j[:, None]
    return load_scores(scratch, offsets, scored, other, logs, fixed), scored


@triton.jit
def _sums(products, qk_scale, shift):
    """Block scores relative to 2^shift [query blocks]: sums over the rows, [J, query blocks]."""
    # an explicit fma, so columns of equal products get equal sums, masked or not
    terms = tl.exp2(tl.fma(products, qk_scale, -shift[None, :, None]))
    # in two steps, because one long chain of additions in each thread would wait for itself
    return tl.sum(tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1], 8, terms.shape[2] // 8]), 2), 2)


@triton.jit
def _log_sums(products, qk_scale):
    """log2 of the block scores, each sum taken relative to the block's own largest score: [J, query blocks]."""
    best = tl.where(qk_scale > 0, tl.max(products, 2), tl.min(products, 2))
    # an all -inf column must not become NaN through -inf - -inf
    shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
    # subtract before scaling: huge products round too coarsely once they are scaled
    return best * qk_scale + tl.log2(tl.sum(tl.exp2((products - shift[:, :, None]) * qk_scale), 2))


@triton.jit
def _store(scratch, scores, j, inside, best):
    """Stores block scores [J, query blocks] inside. Returns the running maxima of the finite ones."""
    q = tl.arange(0, scores.shape[1])
    tl.store(scratch.base + q[None, :] * scratch.stride + j[:, None], scores, mask=inside)
    return tl.maximum(best, tl.where((tl.abs(scores) < float("inf")) & inside, scores, float("-inf")))
