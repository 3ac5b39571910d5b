"""The search in Triton: one kernel pools the keys, one scores and thresholds the blocks and writes the bits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap import WORD_BITS, ceil_div
from flexprefill.search.rule import Rule

LOG2_E = math.log2(math.e)
TILE_J = 64  # key-block means a step: the first operand of the product, one warpgroup's rows
# Measured on an H200 (bf16, 32 heads, D 128, 256K): 3 programs a multiprocessor with registers capped so that all
# three fit 6.4 ms, 2 uncapped 7.8 ms, 3 uncapped 10.3 ms (only two fit, and the third waits)
CAPPED_PROGRAMS, CAPPED_REGISTERS = 3, 168
UNCAPPED_PROGRAMS = 2
INTERPRETED_PROGRAMS = 2  # the interpreter runs programs one by one; two exercise the persistent loop


@triton.jit
def pool_kernel(
    key_ptr,
    means_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    kv_len,
    columns,
    HEADS,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One key block's mean in float32: key [B, H, S, D] to means [B, H, N, D], contiguous."""
    J = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = J * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    base = key_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
    inside = (s[:, None] < kv_len) & (d[None, :] < D)
    offsets = s.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    keys = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(kv_len - J * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(keys, 0) / count
    tl.store(means_ptr + (head * columns + J) * D + d, mean.to(means_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _tile_scores(
    means_base,
    query_base,
    q_t,
    j,
    j_end,
    row,
    q_len,
    stride_s,
    stride_d,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_STEP: tl.constexpr,
):
    """Products of a tile of means with the query block, transposed: float32 [J, rows]."""
    if D_STEP == D_PAD:
        d = tl.arange(0, D_PAD)
        mask = (j[:, None] < j_end) & (d[None, :] < D)
        means = tl.load(means_base + j[:, None] * D + d[None, :], mask=mask, other=0.0)
        products = tl.dot(means, q_t, input_precision="ieee")
    else:
        products = tl.zeros([j.shape[0], row.shape[0]], tl.float32)
        for d0 in range(0, D_PAD, D_STEP):
            d = d0 + tl.arange(0, D_STEP)
            mask = (j[:, None] < j_end) & (d[None, :] < D)
            means = tl.load(means_base + j[:, None] * D + d[None, :], mask=mask, other=0.0)
            q_offsets = row.to(tl.int64)[None, :] * stride_s + d[:, None] * stride_d
            q_mask = (row[None, :] < q_len) & (d[:, None] < D)
            part = tl.load(query_base + q_offsets, mask=q_mask, other=0.0)
            products = tl.dot(means, part, products, input_precision="ieee")
    return products


@triton.jit
def _store_scores(scratch_row, scores, sees, j, columns, best, MASKED: tl.constexpr):
    """Reduces scores [J, rows] to log2 of the block scores, stores them, returns the running finite maxima."""
    if MASKED:
        scores = tl.where(sees, scores, float("-inf"))
    m = tl.max(scores, 1)
    # an all -inf column must not become NaN through -inf - -inf: those blocks are told apart by position
    shift = tl.where(m == float("-inf"), 0.0, m)
    L = m + tl.log2(tl.sum(tl.exp2(scores - shift[:, None]), 1))
    tl.store(scratch_row + j, L, mask=j < columns)
    comparable = (tl.abs(L) < float("inf")) & (j < columns)
    return tl.maximum(best, tl.where(comparable, L, float("-inf")))


@triton.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "rows",
        "columns",
        "width",
        "tiles",
        "sink",
        "window",
        "last_full",
        "min_blocks",
    ]
)
def search_kernel(
    query_ptr,
    means_ptr,
    words_ptr,
    scratch_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    q_len,
    kv_len,
    rows,
    columns,
    width,
    tiles,
    HEADS,
    GROUP,
    qk_scale,
    log2_alpha,
    sink,
    window,
    last_full,
    min_blocks,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    D_STEP: tl.constexpr,
):
    """A persistent grid over (query block, head): scores into a scratch row of the program, then the bits.

    The products are transposed, means × queries, so that the maximum and the sum over the query rows run
    along each thread's own registers. Query blocks go from the last, which sees most, to the first.
    """
    program = tl.program_id(0)
    offset = kv_len - q_len
    scratch_row = scratch_ptr + program.to(tl.int64) * columns
    r = tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    heads_total = tiles // rows
    for tile in range(program, tiles, tl.num_programs(0)):
        I = rows - 1 - tile // heads_total
        batch_head = (tile % heads_total).to(tl.int64)
        batch = batch_head // HEADS
        head = batch_head % HEADS
        first = offset + I * BLOCK  # position of the block's first row
        last = offset + tl.minimum((I + 1) * BLOCK, q_len) - 1
        visible = last // BLOCK + 1
        # blocks that the last row sees whole, and blocks that every row sees whole
        scored = tl.where(last + 1 == kv_len, columns, (last + 1) // BLOCK)
        short = q_len < (I + 1) * BLOCK
        unmasked = tl.where(short, 0, (first + 1) // BLOCK // TILE * TILE)
        window_start = visible - window
        if (I >= rows - last_full) | (visible <= sink):
            window_start = 0
        if window_start <= 0:  # all is kept whatever the scores
            scored = 0
            unmasked = 0
        best = tl.full([TILE], float("-inf"), tl.float32)
        if scored > 0:
            row = I * BLOCK + r
            query_base = query_ptr + batch * stride_b + head * stride_h
            means_base = means_ptr + (batch_head // GROUP) * columns * D
            q_t = 0.0
            if D_STEP == D_PAD:
                d = tl.arange(0, D_PAD)
                q_offsets = row.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
                q_mask = (row[:, None] < q_len) & (d[None, :] < D)
                q_t = tl.trans(tl.load(query_base + q_offsets, mask=q_mask, other=0.0))
            for j0 in range(0, unmasked, TILE):
                j = j0 + tl.arange(0, TILE)
                scores = qk_scale * _tile_scores(
                    means_base, query_base, q_t, j, columns, row, q_len, stride_s, stride_d, D, D_PAD, D_STEP
                )
                best = _store_scores(scratch_row, scores, scores == scores, j, columns, best, False)
            for j0 in range(unmasked, scored, TILE):
                j = j0 + tl.arange(0, TILE)
                scores = qk_scale * _tile_scores(
                    means_base, query_base, q_t, j, scored, row, q_len, stride_s, stride_d, D, D_PAD, D_STEP
                )
                last_key = tl.minimum((j + 1) * BLOCK, kv_len) - 1
                sees = (last_key[:, None] <= (offset + row)[None, :]) & (row[None, :] < q_len)
                sees = sees & (j[:, None] < scored)
                best = _store_scores(scratch_row, scores, sees, j, columns, best, True)
            # the scores were written by other threads of this program
            tl.debug_barrier()
        maximum = tl.max(best, 0)
        threshold = maximum + log2_alpha

        if min_blocks > 0:
            # the min_blocks-th best score, ties counted together: step down from one distinct value to the next
            kth = float("inf")
            count = 0
            for _ in range(0, min_blocks):
                if count < min_blocks:
                    below = tl.full([TILE], float("-inf"), tl.float32)
                    for j0 in range(0, scored, TILE):
                        j = j0 + tl.arange(0, TILE)
                        L = tl.load(scratch_row + j, mask=j < scored, other=float("-inf"))
                        below = tl.maximum(below, tl.where((tl.abs(L) < float("inf")) & (kth > L), L, float("-inf")))
                    kth = tl.max(below, 0)
                    equal = tl.zeros([TILE], tl.int32)
                    for j0 in range(0, scored, TILE):
                        j = j0 + tl.arange(0, TILE)
                        L = tl.load(scratch_row + j, mask=j < scored, other=float("nan"))
                        equal += (kth == L).to(tl.int32)
                    count += tl.sum(equal, 0)
            threshold = tl.minimum(threshold, kth)

        words_row = words_ptr + (batch_head * rows + I) * width
        for w0 in range(0, width, 4):
            w = w0 + tl.arange(0, 4)
            j = w[:, None] * 32 + lane[None, :]
            L = tl.load(scratch_row + j, mask=j < scored, other=float("-inf"))
            chosen = (j < scored) & ((L >= threshold) | ((tl.abs(L) < float("inf")) == 0))
            forced = (j < sink) | (j >= window_start)
            keep = (j < visible) & (chosen | forced)
            bits = tl.sum(keep.to(tl.int32) << lane[None, :], 1)
            tl.store(words_row + w, bits, mask=w < width)
        # the next tile overwrites scores that other threads may still read
        tl.debug_barrier()


def pool_keys(key: Tensor, block_size: int) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D]."""
    batch, heads, kv_len, head_dim = key.shape
    columns = ceil_div(kv_len, block_size)
    # the interpreter truncates to bfloat16 instead of rounding: there, round outside
    dtype = key.dtype if key.is_cuda else torch.float32
    means = torch.empty(batch, heads, columns, head_dim, dtype=dtype, device=key.device)
    pool_kernel[(columns, batch * heads)](
        key,
        means,
        *key.stride(),
        kv_len,
        columns,
        heads,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK=block_size,
        num_warps=4,
    )
    return means.to(key.dtype)


def search_words(query: Tensor, key: Tensor, rule: Rule) -> Tensor:
    """The words of the map that the rule gives: int32 [B, Hq, M, ceil(N / 32)]. See PrefillConfig."""
    return score_words(query, pool_keys(key, rule.block_size), key.shape[2], rule)


def score_words(query: Tensor, means: Tensor, kv_len: int, rule: Rule) -> Tensor:
    """As :func:`search_words`, from the means of the kv_len keys' blocks: [B, Hkv, N, D]."""
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16; products of bfloat16 are exact in float32
        query, means = query.float(), means.float()
    batch, heads, q_len, head_dim = query.shape
    columns = means.shape[2]
    rows = ceil_div(q_len, rule.block_size)
    width = ceil_div(columns, WORD_BITS)
    tiles = batch * heads * rows
    head_pad = triton.next_power_of_2(head_dim)
    capped = head_pad <= 128 and query.dtype != torch.float32  # larger tiles would spill
    programs = min(tiles, _program_limit(query.device, capped))
    words = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=query.device)
    scratch = torch.empty(programs, columns, dtype=torch.float32, device=query.device)
    search_kernel[(programs,)](
        query,
        means,
        words,
        scratch,
        *query.stride(),
        q_len,
        kv_len,
        rows,
        columns,
        width,
        tiles,
        heads,
        heads // means.shape[1],
        rule.scale * LOG2_E,
        rule.log2_alpha,
        rule.sink_blocks,
        rule.window_blocks,
        rule.last_full_blocks,
        rule.min_blocks,
        D=head_dim,
        D_PAD=head_pad,
        BLOCK=rule.block_size,
        TILE=TILE_J,
        # float32 goes through D in steps: its products are exact, not tensor-core ones, and registers are few
        D_STEP=min(32, head_pad) if query.dtype == torch.float32 else head_pad,
        num_warps=4,
        num_stages=2,
        maxnreg=CAPPED_REGISTERS if capped else None,
    )
    return words


def _program_limit(device: torch.device, capped: bool) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    each = CAPPED_PROGRAMS if capped else UNCAPPED_PROGRAMS
    return each * torch.cuda.get_device_properties(device).multi_processor_count
