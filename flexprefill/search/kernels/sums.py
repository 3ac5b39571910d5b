from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.search.kernels.visibility import is_scored

LARGE = tl.constexpr(1e30)  # products below it are far from overflow in float32


@triton.jit
def _sums(products, qk_scale, shift):
    """Block scores relative to 2^shift [query blocks]: sums over the rows, [J, query blocks]."""
    # fused by name: columns of equal products get equal sums, masked or not
    terms = tl.exp2(tl.fma(products, qk_scale, -shift[None, :, None]))
    # in two steps: one long chain of additions in each thread would wait for itself
    return tl.sum(tl.sum(tl.reshape(terms, [terms.shape[0], terms.shape[1], 8, terms.shape[2] // 8]), 2), 2)


@triton.jit
def _log_sums(products, qk_scale):
    """log2 of the block scores, each sum taken relative to the block's own largest score: [J, query blocks]."""
    best = tl.where(qk_scale > 0, tl.max(products, 2), tl.min(products, 2))
    # an all -inf column must not become NaN through -inf - -inf
    shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
    # products of huge size differ before they are scaled: their scaled values round too coarsely to be subtracted
    return best * qk_scale + tl.log2(tl.sum(tl.exp2((products - shift[:, :, None]) * qk_scale), 2))


@triton.jit
def _store(scratch_base, scores, j, inside, stride, best):
    """Stores block scores [J, query blocks] inside, and returns the running maxima of the finite ones."""
    q = tl.arange(0, scores.shape[1])
    tl.store(scratch_base + q[None, :] * stride + j[:, None], scores, mask=inside)
    return tl.maximum(best, tl.where((tl.abs(scores) < float("inf")) & inside, scores, float("-inf")))


@triton.jit
def load_scores(scratch_base, offsets, member_stride, mask, other, logs, MEMBERS: tl.constexpr):
    """Block scores, of the query heads that share a mask together: sums, or where logs is set log2 of sums."""
    scores = tl.load(scratch_base + offsets, mask=mask, other=other)
    for member in tl.static_range(1, MEMBERS):
        more = tl.load(scratch_base + member * member_stride + offsets, mask=mask, other=other)
        best = tl.maximum(scores, more)
        shift = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        log_sums = shift + tl.log2(tl.exp2(scores - shift) + tl.exp2(more - shift))
        scores = tl.where(logs, log_sums, scores + more)
    return scores


@triton.jit
def best_of_group(
    scratch_base,
    stride,
    member_stride,
    first_tile,
    most,
    scored,
    rows_seen,
    logs,
    TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """The greatest finite scores of each query block [TILE, query blocks], and where the sums say too little."""
    q = tl.arange(0, scored.shape[1])
    best = tl.full([TILE, scored.shape[1]], float("-inf"), tl.float32)
    doubtful = tl.zeros([TILE, scored.shape[1]], tl.int1)
    for j0 in range(first_tile, most, TILE):
        j = j0 + tl.arange(0, TILE)
        mask = is_scored(j[:, None], scored, rows_seen, BLOCK, FIRST_KEY, CUT)
        offsets = q[None, :] * stride + j[:, None]
        scores = load_scores(scratch_base, offsets, member_stride, mask, float("-inf"), logs, MEMBERS)
        best = tl.maximum(best, tl.where(tl.abs(scores) < float("inf"), scores, float("-inf")))
        doubtful = doubtful | (mask & ((scores == 0) | (scores == float("inf"))))
    return best, doubtful


@triton.jit
def shift_by(products, j0, base, qk_scale):
    """The largest score of each query block's block base, 0 where the tile from j0 does not have it or it is huge."""
    j = j0 + tl.arange(0, products.shape[0])
    shift = tl.max(tl.where(j[:, None] == base[None, :], tl.max(products * qk_scale, 2), float("-inf")), 0)
    return tl.where(tl.abs(shift) < LARGE, shift, 0.0)


@triton.jit
def add_sums(
    products,
    qk_scale,
    shift,
    scratch_base,
    j0,
    columns,
    stride,
    scored,
    rows_seen,
    best,
    doubtful,
    BLOCK: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr,
):
    """Stores a tile's block scores relative to 2^shift; doubtful where that says too little."""
    j = j0 + tl.arange(0, products.shape[0])
    sums = _sums(products, qk_scale, shift)
    best = _store(scratch_base, sums, j, j[:, None] < columns, stride, best)
    are_scored = is_scored(j[:, None], scored, rows_seen, BLOCK, FIRST_KEY, CUT)
    return best, doubtful | (are_scored & ((sums == 0) | (sums == float("inf"))))


@triton.jit
def add_log_sums(products, qk_scale, scratch_base, j0, columns, stride, logs, best):
    """Stores log2 of a tile's block scores, of the query blocks where logs is set."""
    j = j0 + tl.arange(0, products.shape[0])
    inside = (j[:, None] < columns) & logs[None, :]
    return _store(scratch_base, _log_sums(products, qk_scale), j, inside, stride, best)
