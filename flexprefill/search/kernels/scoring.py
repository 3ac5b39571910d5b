"""The scoring kernel in Triton. It scores the blocks, finds each row's threshold and writes the bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexprefill.search.kernels.products import (
    HeadInputs,
    Scales,
    Slope,
    load_queries,
    own_products,
    rows_alone,
    tile_products,
)
from flexprefill.search.kernels.sums import (
    Scratch,
    add_log_sums,
    add_sums,
    best_of_group,
    kth_best,
    load_scores,
    no_sums,
    shift_by,
)
from flexprefill.search.kernels.visibility import (
    BlockRule,
    Cuts,
    Fixed,
    OneSequence,
    PromptSizes,
    cut_prompt,
    is_kept,
    is_scored,
    sequence_at,
    unmasked_end,
    whole_prompt,
)

ONE, SEVERAL = tl.constexpr(False), tl.constexpr(True)  # sequences of a tile's rows
SMALLEST_LOG2_ALPHA = tl.constexpr(-100.0)  # below it a block kept could underflow


class Tensors(NamedTuple):
    """Queries [B, HEADS, S_q, D], and means [B, HEADS / GROUP, N, D] or what pool_keys makes of sequences."""

    query_ptr: Any
    stride_b: Any  # of the queries
    stride_h: Any
    stride_s: Any
    stride_d: Any
    means_ptr: Any
    HEADS: Any
    GROUP: Any
    alibi_ptr: Any  # [3, HEADS], the heads' Slopes


class Alphas(NamedTuple):
    """How far below the best score a block is still kept, and how many blocks are kept at least."""

    log2_alpha: Any
    log2_alphas_ptr: Any  # [HEADS]
    min_blocks: Any


class SearchCall(NamedTuple):
    """All that the search of one call is told."""

    tensors: Any
    scales: Any
    prompt: Any
    rule: Any
    cuts: Any
    alphas: Any
    words_ptr: Any  # [B, HEADS, rows, width]
    width: Any


class TileTask(NamedTuple):
    """What the query heads that share a mask have in common for one tile of query blocks."""

    query_base: Any  # of the batch entry
    head: Any  # the first of them in it
    log2_alpha: Any  # the first one's
    whole_rows: Any  # what load_queries gives of the first one
    means_base: Any
    own_base: Any  # means of sequences in their own blocks, from the first query's
    some_alone: Any  # whether some row's sequence lies in one block alone
    unmasked: Any  # what unmasked_end gives


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "columns", "width", "tiles", "sink_blocks", "window_blocks",
    "last_full_blocks", "min_blocks", "sequence_stride", "sliding_window",
]  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def search_kernel(
    query_ptr, means_ptr, words_ptr, scratch_ptr, stride_b, stride_h, stride_s, scratch_stride, q_len, kv_len, rows,
    columns, width, tiles, HEADS, GROUP, qk_scale, log2_alpha, sink_blocks, window_blocks, last_full_blocks,
    min_blocks, stride_d, starts_ptr, ends_ptr, sequence_stride, sliding_window, inner_scale, soft_cap, alibi_ptr,
    log2_alphas_ptr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    TILE: tl.constexpr, D_STEP: tl.constexpr, WORDS: tl.constexpr, MEMBERS: tl.constexpr, FIRST_KEY: tl.constexpr,
    CUT: tl.constexpr, SEQUENCES: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, ALPHAS: tl.constexpr,
):  # fmt: skip
    """A persistent grid over (QUERY_BLOCKS neighbouring query blocks, mask).

    A program writes scores into scratch rows of its own, and then the bits. MEMBERS query heads share a mask. Each has
    its own scratch rows, and they are added when they are read. Query blocks go from the last to the first, because the
    last see most.

    With CUT, rows see their own sequence (SEQUENCES) in a sliding window. Tiles then begin with the first block that a
    row sees. SOFT_CAP and ALIBI make log2 scores of the products, and qk_scale is 1. With ALPHAS each query head has
    its own threshold.
    """
    program = tl.program_id(0)
    prompt = PromptSizes(q_len, kv_len, kv_len - q_len, rows, columns)
    member_stride = QUERY_BLOCKS * scratch_stride
    scratch_base = scratch_ptr + program.to(tl.int64) * MEMBERS * member_stride
    scratch = Scratch(scratch_base, scratch_stride, member_stride, columns)
    hidden = tl.where(qk_scale > 0, float("-inf"), float("inf"))
    call = SearchCall(
        Tensors(query_ptr, stride_b, stride_h, stride_s, stride_d, means_ptr, HEADS, GROUP, alibi_ptr),
        Scales(qk_scale, hidden, inner_scale, soft_cap),
        prompt,
        BlockRule(sink_blocks, window_blocks, last_full_blocks),
        Cuts(starts_ptr, ends_ptr, sequence_stride, sliding_window),
        Alphas(log2_alpha, log2_alphas_ptr, min_blocks),
        words_ptr,
        width,
    )
    q = tl.arange(0, QUERY_BLOCKS)
    r = tl.arange(0, QUERY_BLOCKS * BLOCK)
    groups = (rows + QUERY_BLOCKS - 1) // QUERY_BLOCKS
    masks_total = tiles // groups
    for tile in range(program, tiles, tl.num_programs(0)):
        I0 = (groups - 1 - tile // masks_total) * QUERY_BLOCKS
        batch_head = (tile % masks_total).to(tl.int64) * MEMBERS  # the first of the mask's
        _search_tile(
            I0, I0 + q, I0 * BLOCK + r, batch_head, call, scratch,
            Fixed(
                D, D_PAD, BLOCK, QUERY_BLOCKS, TILE, D_STEP, WORDS, MEMBERS,
                FIRST_KEY, CUT, SEQUENCES, SOFT_CAP, ALIBI, ALPHAS, ONE,
            ),
        )  # fmt: skip
        # other threads may still read scores that the next tile overwrites
        tl.debug_barrier()


@triton.jit
def _search_tile(I0, I, row, batch_head, call, scratch, fixed):
    """The search for query blocks I, from I0, and their rows, of the query heads from batch_head that share a mask."""
    if fixed.SEQUENCES:
        batch = batch_head // call.tensors.HEADS
        sequence, several = sequence_at(I0, row, batch, call.prompt, call.cuts, fixed)
        # one sequence for all rows takes a fraction of the instructions, and most tiles have one
        if several:
            _search_rows(I0, I, row, batch_head, sequence, call, scratch, Fixed(*fixed[:-1], SEVERAL))
        else:
            _search_rows(I0, I, row, batch_head, sequence, call, scratch, fixed)
    else:
        everything = OneSequence(0, call.prompt.kv_len)
        _search_rows(I0, I, row, batch_head, everything, call, scratch, fixed)


@triton.jit
def _search_rows(I0, I, row, batch_head, sequence, call, scratch, fixed):
    """As _search_tile, where it is known whether the rows are of one sequence."""
    if fixed.CUT:
        batch = batch_head // call.tensors.HEADS
        queries, bounds = cut_prompt(I0, I, row, batch, sequence, call.prompt, call.rule, call.cuts, fixed)
    else:
        queries, bounds = whole_prompt(I, row, call.prompt, call.rule, call.cuts, fixed)
    threshold = tl.zeros([fixed.QUERY_BLOCKS], tl.float32)
    logs = bounds.I >= 0  # where scores are in log2; here all
    if bounds.most > 0:
        threshold, logs = _score(I0, batch_head, logs, call, queries, bounds, scratch, fixed)
        # other threads of this program wrote the scores
        tl.debug_barrier()
    if call.alphas.min_blocks > 0:
        # a row that has no more blocks than these keeps them all
        threshold = tl.minimum(threshold, kth_best(call.alphas.min_blocks, scratch, bounds, fixed))
    _write_words(I0, batch_head, threshold, logs, scratch, bounds, call, fixed)


@triton.jit
def _score(I0, batch_head, logs, call, queries, bounds, scratch, fixed):
    """Scores the blocks. Returns each query block's threshold, and where it and the scores are in log2.

    Elsewhere the scores are sums relative to the largest score of one block. Such a sum can overflow, or hide a score
    that is not finite. The query block is then scored again, relative to each block's own maximum. With ALiBi that is
    done at once, because its distances soon outweigh products.
    """
    threshold = tl.zeros([fixed.QUERY_BLOCKS], tl.float32)
    own = tl.zeros([fixed.QUERY_BLOCKS * fixed.BLOCK], tl.float32)
    task = _task_of(I0, batch_head, call, queries, bounds, fixed)
    if (fixed.D_STEP == fixed.D_PAD) and not fixed.ALIBI:  # noqa: SIM102
        if (call.alphas.min_blocks == 0) & (task.log2_alpha >= SMALLEST_LOG2_ALPHA):
            # the second pass uses own too: new zeros would cost registers where heads share a mask
            best, doubtful, own = _relative_sums(own, task, call, queries, bounds, scratch, fixed)
            logs = tl.max(doubtful.to(tl.int32), 0) != 0
            threshold = tl.max(best, 0) * tl.exp2(task.log2_alpha)
    if tl.max(logs.to(tl.int32), 0) != 0:
        best = _sums_in_logs(own, logs, task, call, queries, bounds, scratch, fixed)
        threshold = tl.where(logs, tl.max(best, 0) + task.log2_alpha, threshold)
    return threshold, logs


@triton.jit
def _relative_sums(own, task, call, queries, bounds, scratch, fixed):
    """Scores the blocks as sums relative to the largest score of the query block's first block.

    That block may be anywhere in a tile. So a sequence gets the same bits alone and among others. Returns the best
    sums, the doubtful ones, and own.
    """
    prompt, qk_scale, base = call.prompt, call.scales.qk_scale, bounds.base
    first_tile, second_tile = bounds.first_tile, bounds.first_tile + fixed.TILE
    shift = tl.zeros([fixed.QUERY_BLOCKS], tl.float32)
    found = no_sums(fixed)
    for member in range(0, fixed.MEMBERS):
        own_scratch = _scratch_of(member, scratch)
        inputs = _inputs_of(member, own, task, call, queries, fixed)
        own = inputs.own
        products = tile_products(first_tile, inputs, queries, prompt, fixed, True)
        if member == 0:
            shift = shift_by(products, first_tile, base, qk_scale)
        found = add_sums(products, first_tile, shift, qk_scale, found, own_scratch, bounds, fixed)
        for j0 in range(second_tile, task.unmasked, fixed.TILE):
            products = tile_products(j0, inputs, queries, prompt, fixed, False)
            found = add_sums(products, j0, shift, qk_scale, found, own_scratch, bounds, fixed)
        for j0 in range(tl.maximum(task.unmasked, second_tile), bounds.most, fixed.TILE):
            products = tile_products(j0, inputs, queries, prompt, fixed, True)
            if fixed.CUT and fixed.QUERY_BLOCKS > 1:
                # a later query block's first block may lie in a later tile
                begins = (base >= j0) & (base < j0 + fixed.TILE) & (member == 0)
                shift = tl.where(begins, shift_by(products, j0, base, qk_scale), shift)
            found = add_sums(products, j0, shift, qk_scale, found, own_scratch, bounds, fixed)
    if fixed.MEMBERS > 1:
        tl.debug_barrier()
        found = best_of_group(scratch, False, bounds, fixed)
        tl.debug_barrier()  # other threads may still read scores that the second pass overwrites
    best, doubtful = found
    return best, doubtful, own


@triton.jit
def _sums_in_logs(own, logs, task, call, queries, bounds, scratch, fixed):
    """Scores the blocks in log2 for the query blocks where logs is set. Returns the best scores."""
    prompt, qk_scale = call.prompt, call.scales.qk_scale
    first_tile, second_tile = bounds.first_tile, bounds.first_tile + fixed.TILE
    best, _ = no_sums(fixed)
    # ALiBi's arithmetic is much simpler in tiles that every row sees whole
    done = 0
    if fixed.ALIBI:
        done = tl.maximum(task.unmasked - second_tile, 0)
    for member in range(0, fixed.MEMBERS):
        own_scratch = _scratch_of(member, scratch)
        inputs = _inputs_of(member, own, task, call, queries, fixed)
        own = inputs.own
        if fixed.ALIBI:
            for j0 in range(second_tile, task.unmasked, fixed.TILE):
                products = tile_products(j0, inputs, queries, prompt, fixed, False)
                best = add_log_sums(products, j0, logs, qk_scale, best, own_scratch, fixed)
        for step in range(first_tile, bounds.most - done, fixed.TILE):
            j0 = step + tl.where(step > first_tile, done, 0)
            products = tile_products(j0, inputs, queries, prompt, fixed, True)
            best = add_log_sums(products, j0, logs, qk_scale, best, own_scratch, fixed)
    if fixed.MEMBERS > 1:
        tl.debug_barrier()
        best, _ = best_of_group(scratch, True, bounds, fixed)
    return best


@triton.jit
def _task_of(I0, batch_head, call, queries, bounds, fixed):
    """The TileTask of the query blocks from I0 and the query heads from batch_head."""
    tensors, prompt = call.tensors, call.prompt
    query_base = tensors.query_ptr + (batch_head // tensors.HEADS) * tensors.stride_b
    head = batch_head % tensors.HEADS
    log2_alpha = call.alphas.log2_alpha
    if fixed.ALPHAS:
        log2_alpha = tl.load(call.alphas.log2_alphas_ptr + head)
    means_rows = prompt.columns
    if fixed.SEQUENCES:
        means_rows = 2 * prompt.columns + prompt.kv_len
    means_base = tensors.means_ptr + (batch_head // tensors.GROUP) * means_rows * fixed.D
    own_base = means_base + (2 * prompt.columns + prompt.offset).to(tl.int64) * fixed.D
    some_alone = False
    if fixed.SEVERAL:
        some_alone = tl.max(rows_alone(queries, prompt, fixed).to(tl.int32), 0) > 0
    unmasked = unmasked_end(I0, queries, bounds, prompt, fixed)
    whole_rows = 0.0
    if fixed.D_STEP == fixed.D_PAD:
        # for both passes: to load it again would cost the hot loop registers
        first_base = query_base + head * tensors.stride_h
        whole_rows = load_queries(first_base, tensors.stride_s, tensors.stride_d, queries.row, prompt.q_len, fixed)
    return TileTask(query_base, head, log2_alpha, whole_rows, means_base, own_base, some_alone, unmasked)


@triton.jit
def _inputs_of(member, own, task, call, queries, fixed):
    """One query head's HeadInputs."""
    prompt, stride_s, stride_d = call.prompt, call.tensors.stride_s, call.tensors.stride_d
    query_base = task.query_base + (task.head + member) * call.tensors.stride_h
    whole_rows = task.whole_rows
    if (fixed.D_STEP == fixed.D_PAD) and (fixed.MEMBERS > 1):
        whole_rows = load_queries(query_base, stride_s, stride_d, queries.row, prompt.q_len, fixed)
    if fixed.SEVERAL:  # noqa: SIM102
        if task.some_alone:
            own = own_products(task.own_base, query_base, stride_s, stride_d, queries, prompt, fixed)
    slope = _slope_of(member, task.head, call.tensors, fixed)
    return HeadInputs(query_base, stride_s, stride_d, whole_rows, task.means_base, own, call.scales, slope)


@triton.jit
def _scratch_of(member, scratch):
    """One query head's scratch rows."""
    base = scratch.base + member * scratch.member_stride
    return Scratch(base, scratch.stride, scratch.member_stride, scratch.columns)


@triton.jit
def _slope_of(member, head, tensors, fixed):
    """A query head's Slope. Zeros where there is none."""
    if fixed.ALIBI:
        of_head = tensors.alibi_ptr + head + member
        slope, share = tl.load(of_head), tl.load(of_head + tensors.HEADS)
        whole_ratio = tl.load(of_head + 2 * tensors.HEADS)
    else:
        slope, share, whole_ratio = 0.0, 0.0, 0.0
    return Slope(slope, share, whole_ratio)


@triton.jit
def _write_words(I0, batch_head, threshold, logs, scratch, bounds, call, fixed):
    """Turns the scores of a tile of query blocks into their words, the same for all heads that share a mask."""
    rows, width = call.prompt.rows, call.width
    words_row = call.words_ptr + (batch_head * rows + I0) * width
    q = tl.arange(0, fixed.QUERY_BLOCKS)
    for w0 in range(0, width, fixed.WORDS):
        w = w0 + tl.arange(0, fixed.WORDS)
        j = w[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        scored = is_scored(j, bounds, fixed)
        offsets = q[:, None, None] * scratch.stride + j
        L = load_scores(scratch, offsets, scored, float("-inf"), logs[:, None, None], fixed)
        # a score that is not finite is no reason to drop a block
        chosen = scored & ((L >= threshold[:, None, None]) | ((tl.abs(L) < float("inf")) == 0))
        kept = is_kept(j, chosen, bounds, call.rule, fixed)
        bits = tl.sum(kept.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)
        for member in tl.static_range(0, fixed.MEMBERS):
            words_member = words_row + member * rows * width
            inside_words = (w[None, :] < width) & (bounds.I[:, None] < rows)
            tl.store(words_member + q[:, None] * width + w[None, :], bits, mask=inside_words)
