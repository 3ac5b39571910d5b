"""The scoring kernel written for Hopper: the search of kernels.search_kernel for its commonest shape.

In Gluon, where layouts and waits are the author's: one buffer for the means, refilled while the last tile is summed
up, and no register that the hot loop does not need, so that four programs share a multiprocessor.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma

BLOCK = gl.constexpr(128)
TILE = gl.constexpr(64)
LARGE = gl.constexpr(1e30)
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name before and since triton 3.7


@gluon.jit
def _bounds(I, sizes, rule):
    """Of query block I: blocks visible, the first in the window, blocks with a score, tiles that need no masking."""
    offset, q_len, kv_len, rows, columns = sizes
    sink, window, last_full = rule
    last = offset + gl.minimum((I + 1) * BLOCK, q_len) - 1
    visible = last // BLOCK + 1
    window_start = gl.where((I >= rows - last_full) | (visible <= sink), 0, visible - window)
    scored = gl.where(last + 1 == kv_len, columns, (last + 1) // BLOCK)
    scored = gl.where((I < rows) & (window_start > 0), scored, 0)
    unmasked = gl.where(q_len < (I + 1) * BLOCK, 0, (offset + I * BLOCK + 1) // BLOCK // TILE)
    return visible, window_start, scored, unmasked


@gluon.jit
def _copy_query(q_smem, base, row, q_len, stride_s, D: gl.constexpr, COPY: gl.constexpr):
    r = row + gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    pointers = base + r.to(gl.int64)[:, None] * stride_s + d[None, :]
    async_copy.async_copy_global_to_shared(q_smem, pointers, mask=r[:, None] < q_len)


@gluon.jit
def _copy_means(k_smem, base, t, end, D: gl.constexpr, COPY: gl.constexpr):
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(k_smem, base + j[:, None] * D + d[None, :], mask=j[:, None] < end)
    async_copy.commit_group()


@gluon.jit
def _multiply(k_smem, q_smem, means, t, end, ACC: gl.constexpr, D: gl.constexpr, COPY: gl.constexpr):
    """Products of the tile of means that is under way with the queries, transposed; then starts tile t + 1."""
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()
    zeros = gl.zeros([TILE, BLOCK], gl.float32, ACC)
    products = warpgroup_mma(k_smem, q_smem.permute((1, 0)), zeros, use_acc=False)
    # every warp has read the buffer
    _barrier()
    _copy_means(k_smem, means, t + 1, end, D, COPY)
    return products


@gluon.jit
def _hide(products, t, I, hidden, offset, q_len, kv_len, ACC: gl.constexpr):
    """Puts hidden where a row does not see the whole of block j, or is past the end."""
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    r = gl.arange(0, BLOCK, gl.SliceLayout(0, ACC))
    first_to_see = gl.minimum((j + 1) * BLOCK, kv_len) - 1 - offset - I * BLOCK
    products = gl.where(r[None, :] >= first_to_see[:, None], products, hidden)
    if q_len < (I + 1) * BLOCK:
        products = gl.where((r < q_len - I * BLOCK)[None, :], products, hidden)
    return products


@gluon.jit
def _score(products, t, scratch, scored, shift, best, doubtful, qk_scale, ACC: gl.constexpr):
    """Stores a tile's block scores relative to 2^shift; doubtful where that says too little."""
    # fused by name: columns of equal products get equal sums, masked or not
    terms = gl.exp2(gl.fma(products, qk_scale, gl.full_like(products, 0.0) - shift))
    # in two steps: one long chain of additions in each thread would wait for itself
    total = gl.sum(gl.sum(gl.reshape(terms, [TILE, 8, BLOCK // 8]), 1), 1)
    total = gl.convert_layout(total, gl.SliceLayout(1, ACC))
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    gl.store(scratch + j, total)
    inside = j < scored
    best = gl.maximum(best, gl.where(inside & (total < float("inf")), total, 0.0))
    doubtful = gl.maximum(doubtful, gl.where(inside & ((total == 0.0) | (total == float("inf"))), 1.0, 0.0))
    return best, doubtful


@gluon.jit
def _largest(a0, a1, b0, b1):
    return gl.maximum(a0, b0), gl.maximum(a1, b1)


@gluon.jit
def _score_exactly(products, t, scratch, scored, best, qk_scale, ACC: gl.constexpr):
    """Stores log2 of a tile's block scores, each taken relative to the block's own largest."""
    sign = gl.where(qk_scale > 0, 1.0, -1.0)
    largest = gl.max(products * sign, 1) * sign
    shift = gl.where(gl.abs(largest) == float("inf"), 0.0, largest)
    L = largest * qk_scale + gl.log2(gl.sum(gl.exp2((products - shift[:, None]) * qk_scale), 1))
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    gl.store(scratch + j, L)
    return gl.maximum(best, gl.where((j < scored) & (gl.abs(L) < float("inf")), L, float("-inf")))


@gluon.jit
def _store_words(words_row, scratch, threshold, visible, window_start, scored, sink, width, WORDS: gl.constexpr):
    """Turns a row of scores into its words."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    for w0 in range(0, width, WORDS):
        w = w0 + gl.arange(0, WORDS, gl.SliceLayout(1, LAYOUT))
        j = w[:, None] * 32 + lane[None, :]
        score = gl.load(scratch + j, mask=j < scored, other=float("-inf"))
        chosen = (j < scored) & ((score >= threshold) | ((gl.abs(score) < float("inf")) == 0))
        keep = (j < visible) & (chosen | (j < sink) | (j >= window_start))
        bits = gl.sum(keep.to(gl.int32) << lane[None, :], 1)
        gl.store(words_row + w, bits, mask=w < width)


@gluon.jit
def _start(tile, inputs, sizes, rule, q_smem, k_smem, D: gl.constexpr, COPY: gl.constexpr):
    """Starts the copies of a query block and of its first means, if it needs them."""
    query_ptr, means_ptr, stride_b, stride_h, stride_s, heads_total, HEADS, GROUP = inputs
    _, q_len, _, rows, columns = sizes
    I = rows - 1 - tile // heads_total
    batch_head = (tile % heads_total).to(gl.int64)
    _, _, scored, _ = _bounds(I, sizes, rule)
    if scored > 0:
        query = query_ptr + (batch_head // HEADS) * stride_b + (batch_head % HEADS) * stride_h
        _copy_query(q_smem, query, I * BLOCK, q_len, stride_s, D, COPY)
        _copy_means(k_smem, means_ptr + (batch_head // GROUP) * columns * D, 0, columns, D, COPY)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "rows", "columns", "width", "tiles", "sink", "window", "last_full"])
def search_kernel(
    query_ptr,
    means_ptr,
    words_ptr,
    scratch_ptr,
    stride_b,
    stride_h,
    stride_s,
    scratch_stride,
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
    D: gl.constexpr,
    WORDS: gl.constexpr,
):
    """A persistent grid over (query block, head). See kernels.search_kernel."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [BLOCK, D], gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype))
    k_smem = gl.allocate_shared_memory(dtype, [TILE, D], gl.NVMMASharedLayout.get_default_for([TILE, D], dtype))

    program = gl.program_id(0)
    scratch = scratch_ptr + program.to(gl.int64) * scratch_stride
    offset = kv_len - q_len
    hidden = gl.where(qk_scale > 0, float("-inf"), float("inf"))
    heads_total = tiles // rows
    inputs = (query_ptr, means_ptr, stride_b, stride_h, stride_s, heads_total, HEADS, GROUP)
    sizes = (offset, q_len, kv_len, rows, columns)
    rule = (sink, window, last_full)
    _start(program, inputs, sizes, rule, q_smem, k_smem, D, COPY)
    for tile in range(program, tiles, gl.num_programs(0)):
        I = rows - 1 - tile // heads_total
        batch_head = (tile % heads_total).to(gl.int64)
        visible, window_start, scored, unmasked = _bounds(I, sizes, rule)
        steps = (scored + TILE - 1) // TILE
        threshold = 0.0
        if steps > 0:
            means = means_ptr + (batch_head // GROUP) * columns * D
            end = gl.minimum(columns, steps * TILE)
            best = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, ACC))
            doubtful = best
            shift = 0.0
            t = 0
            while t < steps:
                # the tiles that need care: the first, which sets the shift, and those that the causal edge crosses
                products = _multiply(k_smem, q_smem, means, t, end, ACC, D, COPY)
                if t >= unmasked:
                    products = _hide(products, t, I, hidden, offset, q_len, kv_len, ACC)
                if t == 0:
                    shift = gl.max(gl.max(products * qk_scale, 1), 0)
                    shift = gl.where(gl.abs(shift) < LARGE, shift, 0.0)
                best, doubtful = _score(products, t, scratch, scored, shift, best, doubtful, qk_scale, ACC)
                t += 1
                while t < unmasked:
                    products = _multiply(k_smem, q_smem, means, t, end, ACC, D, COPY)
                    best, doubtful = _score(products, t, scratch, scored, shift, best, doubtful, qk_scale, ACC)
                    t += 1
            async_copy.wait_group(0)
            largest, doubt = gl.reduce((best, doubtful), 0, _largest)
            threshold = largest * gl.exp2(log2_alpha)
            if doubt > 0:
                best = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, ACC))
                _barrier()
                _copy_means(k_smem, means, 0, end, D, COPY)
                for t in range(0, steps):
                    products = _multiply(k_smem, q_smem, means, t, end, ACC, D, COPY)
                    products = _hide(products, t, I, hidden, offset, q_len, kv_len, ACC)
                    best = _score_exactly(products, t, scratch, scored, best, qk_scale, ACC)
                async_copy.wait_group(0)
                threshold = gl.max(best, 0) + log2_alpha
            # the scores were written, and the queries read, by other threads of this program
            _barrier()
        if tile + gl.num_programs(0) < tiles:
            _start(tile + gl.num_programs(0), inputs, sizes, rule, q_smem, k_smem, D, COPY)
        words_row = words_ptr + (batch_head * rows + I) * width
        _store_words(words_row, scratch, threshold, visible, window_start, scored, sink, width, WORDS)
        # the next tile overwrites scores that other threads may still read
        _barrier()
