"""Products of a tile of means with the rows of query blocks. A soft cap and ALiBi change them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexprefill.search.kernels.visibility import sees_block, sequences_of
from flexprefill.variant import logits

LOG2_E = tl.constexpr(logits.LOG2_E)


class Scales(NamedTuple):
    """What turns products into log2 scores."""

    qk_scale: Any  # 1 where a soft cap or ALiBi has made them
    hidden: Any  # the product that is a score of -inf
    inner_scale: Any
    soft_cap: Any  # in log2


class Slope(NamedTuple):
    """A query head's ALiBi: its slope, and in log2 |1 - exp(-slope)| and a whole block's mean share."""

    slope: Any
    share: Any
    whole_ratio: Any


class HeadInputs(NamedTuple):
    """What tile_products multiplies: a query head's rows, and the means of its key head."""

    query_base: Any  # of the head
    stride_s: Any
    stride_d: Any
    whole_rows: Any  # what load_queries gives, where D_STEP is D_PAD
    means_base: Any
    own: Any  # what own_products gives
    scales: Any
    slope: Any


@triton.jit
def load_queries(query_base, stride_s, stride_d, row, q_len, fixed):
    """The rows of one head's query blocks, transposed: [D, rows]."""
    d = tl.arange(0, fixed.D_PAD)
    offsets = row.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    mask = (row[:, None] < q_len) & (d[None, :] < fixed.D)
    return tl.trans(tl.load(query_base + offsets, mask=mask, other=0.0))


@triton.jit
def tile_products(j0, inputs, queries, prompt, fixed, MASKED: tl.constexpr):
    """Products of the means from j0 with the query blocks, transposed: float32 [J, query blocks, rows].

    The sums over a query block's rows then run along each thread's own registers. Neighbouring query blocks share each
    tile of means. MASKED hides the products where a row gives no score to block j. With SEQUENCES, a row takes the mean
    of what its own sequence has in block j. SOFT_CAP and ALIBI make log2 scores of the products.
    """
    j = j0 + tl.arange(0, fixed.TILE)
    means_base = inputs.means_base
    if fixed.SEQUENCES and not fixed.SEVERAL and MASKED:
        # the block in which the sequence starts begins with another one
        starts_inside = (queries.start % fixed.BLOCK != 0) & (j == queries.start // fixed.BLOCK)
        means_base += tl.where(starts_inside, prompt.columns * fixed.D, 0)[:, None]
    products = _dots(j, inputs, means_base, queries, prompt, fixed, MASKED)
    if fixed.SEVERAL:
        products = _of_own_sequences(products, j0, inputs, queries, prompt, fixed)
    if fixed.SOFT_CAP or fixed.ALIBI:
        products = _modified(products, j[:, None], inputs, queries, prompt, fixed, MASKED)
    if MASKED:
        products = tl.where(sees_block(j, queries, prompt, fixed), products, inputs.scales.hidden)
    return tl.reshape(products, [fixed.TILE, fixed.QUERY_BLOCKS, fixed.BLOCK])


@triton.jit
def _dots(j, inputs, means_base, queries, prompt, fixed, MASKED: tl.constexpr):
    """Products of means [J, D] with the rows of query blocks: float32 [J, rows]. A base for all, or [J, 1]."""
    if fixed.D_STEP == fixed.D_PAD:
        d = tl.arange(0, fixed.D_PAD)
        pointers = means_base + j[:, None] * fixed.D + d[None, :]
        if MASKED or fixed.D_PAD != fixed.D:
            means = tl.load(pointers, mask=(j[:, None] < prompt.columns) & (d[None, :] < fixed.D), other=0.0)
        else:
            means = tl.load(pointers)
        products = tl.dot(means, inputs.whole_rows, input_precision="ieee")
    else:
        products = tl.zeros([fixed.TILE, fixed.QUERY_BLOCKS * fixed.BLOCK], tl.float32)
        for d0 in range(0, fixed.D_PAD, fixed.D_STEP):
            d = d0 + tl.arange(0, fixed.D_STEP)
            mask = (j[:, None] < prompt.columns) & (d[None, :] < fixed.D)
            means = tl.load(means_base + j[:, None] * fixed.D + d[None, :], mask=mask, other=0.0)
            part = _query_part(d, inputs.query_base, inputs.stride_s, inputs.stride_d, queries.row, prompt.q_len, fixed)
            products = tl.dot(means, part, products, input_precision="ieee")
    return products


@triton.jit
def _query_part(d, query_base, stride_s, stride_d, row, q_len, fixed):
    """Dimensions d of the rows, transposed: [d, rows]."""
    offsets = row.to(tl.int64)[None, :] * stride_s + d[:, None] * stride_d
    return tl.load(query_base + offsets, mask=(row[None, :] < q_len) & (d[:, None] < fixed.D), other=0.0)


@triton.jit
def rows_alone(queries, prompt, fixed):
    """Whether each row's sequence begins and ends inside the row's own block."""
    start, end = sequences_of(queries, prompt, fixed)
    block_start = queries.position // fixed.BLOCK * fixed.BLOCK
    block_end = tl.minimum(block_start + fixed.BLOCK, prompt.kv_len)
    return (start > block_start) & (start < end) & (end < block_end)


@triton.jit
def own_products(own_base, query_base, stride_s, stride_d, queries, prompt, fixed):
    """Products of rows with the means of their own sequences, where these lie in one block alone: [rows]."""
    row, alone = queries.row, rows_alone(queries, prompt, fixed)
    products = tl.zeros([fixed.QUERY_BLOCKS * fixed.BLOCK], tl.float32)
    for d0 in range(0, fixed.D_PAD, fixed.D_STEP):
        d = d0 + tl.arange(0, fixed.D_STEP)
        part = _query_part(d, query_base, stride_s, stride_d, row, prompt.q_len, fixed).to(tl.float32)
        mask = alone[None, :] & (d[:, None] < fixed.D)
        means = tl.load(own_base + row.to(tl.int64)[None, :] * fixed.D + d[:, None], mask=mask, other=0.0)
        products += tl.sum(part * means.to(tl.float32), 0)
    return products


@triton.jit
def _of_own_sequences(products, j0, inputs, queries, prompt, fixed):
    """The products, with the means of the rows' own sequences where a block's first key is in another sequence."""
    # a sequence lacks a block's first key only in the block in which it starts
    first_block = queries.start // fixed.BLOCK
    lacks = (queries.start % fixed.BLOCK != 0) & (first_block >= j0) & (first_block < j0 + fixed.TILE)
    if lacks | (j0 + fixed.TILE > queries.starts_from):
        start, end = sequences_of(queries, prompt, fixed)
        j = j0 + tl.arange(0, fixed.TILE)
        means_of_last = inputs.means_base + prompt.columns * fixed.D
        of_last = _dots(j, inputs, means_of_last, queries, prompt, fixed, True)
        starts_inside = start[None, :] > j[:, None] * fixed.BLOCK
        products = tl.where(starts_inside, of_last, products)
        ends_inside = end[None, :] < tl.minimum((j + 1) * fixed.BLOCK, prompt.kv_len)[:, None]
        products = tl.where(starts_inside & ends_inside, inputs.own[None, :], products)
    return products


@triton.jit
def _modified(products, j, inputs, queries, prompt, fixed, MASKED: tl.constexpr):
    """Log2 scores of products [J, rows] with a soft cap and ALiBi, as in reference.log_scores."""
    factor = inputs.scales.inner_scale
    if fixed.SOFT_CAP:
        # tanh, exact to float32's rounding of 1: scores relative to the cap need that
        products = 1 - 2 / (tl.exp2(products * factor * (2 * LOG2_E)) + 1)
        factor = inputs.scales.soft_cap
    if fixed.ALIBI:
        nearest, ratio = _distances(j, inputs.slope, queries, prompt, fixed, MASKED)
        # an explicit fma, so whole blocks get the same bits in every tile, masked or not
        scores = tl.fma(products, factor, tl.fma(nearest, inputs.slope.slope * (-LOG2_E), ratio))
    else:
        scores = products * factor
    return scores


@triton.jit
def _distances(j, alibi, queries, prompt, fixed, MASKED: tl.constexpr):
    """Each row's distance to the nearest key of block j, and log2 of the keys' mean share where that key has 1."""
    position = queries.position[None, :]
    seen_end = (j + 1) * fixed.BLOCK
    ratio = alibi.whole_ratio
    if MASKED:
        start, end = queries.start, queries.end
        if fixed.SEVERAL:
            start, end = sequences_of(queries, prompt, fixed)
            start, end = start[None, :], end[None, :]
        seen_first = tl.maximum(j * fixed.BLOCK, start)
        seen_end = tl.minimum(seen_end, end)
        if fixed.FIRST_KEY:
            seen_first = tl.maximum(seen_first, position - queries.sliding_window + 1)
            seen_end = tl.minimum(seen_end, position + 1)
        count = tl.maximum(seen_end - seen_first, 1).to(tl.float32)
        ratio = tl.log2(tl.abs(_one_minus_exp(alibi.slope * count))) - alibi.share - tl.log2(count)
        ratio = tl.where(count == fixed.BLOCK, alibi.whole_ratio, tl.where(alibi.slope == 0, 0.0, ratio))
    return (position - seen_end + 1).to(tl.float32), ratio


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x), also for small x."""
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5))))
    return tl.where(tl.abs(x) < 0.1, series, 1 - tl.exp2(x * (-LOG2_E)))
