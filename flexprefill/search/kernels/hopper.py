"""The scoring kernel for Hopper: it does what scoring.search_kernel does, for the most common shape.

It is written in Gluon, where the author chooses layouts and waits. The tensor memory accelerator refills the one buffer
of means while a tile is summed up. It loads the next row's queries during the last tile. Four programs share a
multiprocessor.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.search.kernels.descriptors import described
from flexprefill.search.kernels.hopper_parts import barrier
from flexprefill.search.kernels.sums import LARGE

BLOCK = gl.constexpr(128)
TILE = gl.constexpr(64)
IN_EACH_WARP = gl.constexpr(gl.SliceLayout(0, gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])))


def describe_tensors(query: Tensor, means: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Queries [B, Hq, S_q, D] and means [B, Hkv, N, D] as the kernel copies them, by query block and by tile."""
    head_dim = query.shape[3]
    return described(query, 1, 1, BLOCK.value, head_dim), described(means.flatten(0, 1), 1, TILE.value, head_dim)


@gluon.jit
def _bounds(I, sizes, rule, FIRST_KEY: gl.constexpr):
    """The bounds of query block I.

    They are the visible blocks, the first block in the window, the blocks with a score, their tiles, and how many tiles
    before the last need no masking.
    """
    offset, q_len, kv_len, rows, columns = sizes
    sink_blocks, window_blocks, last_full_blocks = rule
    last = offset + gl.minimum((I + 1) * BLOCK, q_len) - 1
    visible = last // BLOCK + 1
    window_start = gl.where((I >= rows - last_full_blocks) | (visible <= sink_blocks), 0, visible - window_blocks)
    scored = visible
    if not FIRST_KEY:
        scored = gl.where(last + 1 == kv_len, columns, (last + 1) // BLOCK)
    scored = gl.where((I >= 0) & (window_start > 0), scored, 0)
    steps = (scored + TILE - 1) // TILE
    unmasked = gl.where(q_len < (I + 1) * BLOCK, 0, (offset + I * BLOCK + 1) // BLOCK // TILE)
    return visible, window_start, scored, steps, gl.minimum(unmasked, steps - 1)


@gluon.jit
def _start(I, batch_head, query, means, HEADS, GROUP: gl.constexpr, q_smem, k_smem, ready):
    """Starts to copy a query block and its first means. ready turns to its next phase when both are there."""
    batch = 0
    head = batch_head
    if batch_head >= HEADS:
        batch = batch_head // HEADS
        head = batch_head % HEADS
    mbarrier.expect(ready, query.block_type.nbytes + means.block_type.nbytes)
    tma.async_copy_global_to_shared(query, [batch, head, I * BLOCK, 0], ready, q_smem)
    tma.async_copy_global_to_shared(means, [batch_head // GROUP, 0, 0], ready, k_smem)


@gluon.jit
def _copy_means(kv_head, t, means, k_smem, ready):
    mbarrier.expect(ready, means.block_type.nbytes)
    tma.async_copy_global_to_shared(means, [kv_head, t * TILE, 0], ready, k_smem)


@gluon.jit
def _multiply(q_smem, k_smem, ready, phase, ACC: gl.constexpr):
    """Waits for a tile of means and multiplies it with the queries: [J, rows]. Its buffer is then free."""
    D: gl.constexpr = k_smem.shape[2]
    mbarrier.wait(ready, phase)
    queries = q_smem.reshape([BLOCK, D]).permute((1, 0))
    zeros = gl.zeros([TILE, BLOCK], gl.float32, ACC)
    products = warpgroup_mma(k_smem.reshape([TILE, D]), queries, zeros, use_acc=False)
    # every warp has read the buffer
    barrier()
    return products, phase ^ 1


@gluon.jit
def _hide(products, t, I, scored, offset, q_len, kv_len, ACC: gl.constexpr, FIRST_KEY: gl.constexpr):
    """Puts -inf where a row does not see all of block j (FIRST_KEY: its first key), or one of them is past the end."""
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    r = gl.arange(0, BLOCK, gl.SliceLayout(0, ACC))
    first = gl.minimum((j + 1) * BLOCK, kv_len) - 1
    if FIRST_KEY:
        first = j * BLOCK
    first -= offset + I * BLOCK
    seeing = gl.where(j < scored, gl.maximum(gl.minimum(q_len - I * BLOCK, BLOCK) - first, 0), 0)
    # first <= r < first + seeing in one comparison: a row below first wraps to a huge number
    seen = (r[None, :] - first[:, None]).to(gl.uint32) < seeing.to(gl.uint32)[:, None]
    return gl.where(seen, products, float("-inf"))


@gluon.jit
def _score(products, t, scratch, scored, shift, lowest, highest, qk_scale, ACC: gl.constexpr, MASKED: gl.constexpr):
    """Stores a tile's block scores relative to 2^shift. Returns the least and the greatest so far."""
    # fused by name: columns of equal products get equal sums, masked or not
    terms = gl.exp2(gl.fma(products, qk_scale, gl.full_like(products, 0.0) - shift))
    # in two steps, because one long chain of additions in each thread would wait for itself
    total = gl.sum(gl.sum(gl.reshape(terms, [TILE, 8, BLOCK // 8]), 1), 1)
    total = gl.convert_layout(total, gl.SliceLayout(1, ACC))
    j = gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    gl.store(scratch + t * TILE + j, total)
    highest = gl.maximum(highest, total)
    if MASKED:
        total = gl.where(j < scored - t * TILE, total, 1.0)
    return gl.minimum(lowest, total), highest


@gluon.jit
def _score_exactly(products, t, scratch, scored, best, qk_scale, ACC: gl.constexpr):
    """Stores log2 of a tile's block scores, each relative to the block's own largest product. +inf if not finite."""
    largest = gl.max(products, 1)
    shift = gl.where(gl.abs(largest) == float("inf"), 0.0, largest)
    L = largest * qk_scale + gl.log2(gl.sum(gl.exp2((products - shift[:, None]) * qk_scale), 1))
    finite = gl.abs(L) < float("inf")
    j = t * TILE + gl.arange(0, TILE, gl.SliceLayout(1, ACC))
    gl.store(scratch + j, gl.where(finite, L, float("inf")))
    return gl.maximum(best, gl.where((j < scored) & finite, L, float("-inf")))


@gluon.jit
def _share(smem, values):
    """Values [TILE] of all warps, given to each warp."""
    smem.store(values)
    barrier()
    return smem.load(IN_EACH_WARP)


@gluon.jit
def _from(n):
    """A word with bits n and above set: all for n < 0, none for n > 31. PTX defines that shift, LLVM does not."""
    return gl.inline_asm_elementwise(
        "{ .reg .s32 n; max.s32 n, $1, 0; shl.b32 $0, -1, n; }", "=r,r", [n], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _store_words(words_row, scratch, threshold, visible, window_start, scored, sink_blocks, width, WORDS: gl.constexpr):
    """Turns a row of scores into its words."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    bit = 1 << lane
    for w0 in range(0, width, WORDS):
        w = w0 + gl.arange(0, WORDS, gl.SliceLayout(1, LAYOUT))
        # what stands behind the last score is old
        score = gl.load(scratch + (w[:, None] * 32 + lane))
        # a NaN is not below the threshold
        chosen = gl.sum(gl.where(score < threshold, 0, bit), 1)
        first = w * 32
        kept = (chosen & ~_from(scored - first)) | ~_from(sink_blocks - first) | _from(window_start - first)
        gl.store(words_row + w, kept & ~_from(visible - first), mask=w < width)


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = [
    "offset", "q_len", "kv_len", "rows", "columns", "width", "heads", "rows_step", "heads_step",
    "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def search_kernel(
    query, means, words_ptr, scratch_ptr, scratch_stride, offset, q_len, kv_len, rows, columns, width, heads, HEADS,
    rows_step, heads_step, qk_scale, log2_alpha, sink_blocks, window_blocks, last_full_blocks, log2_alphas_ptr,
    GROUP: gl.constexpr, FIRST_KEY: gl.constexpr, WORDS: gl.constexpr, ALPHAS: gl.constexpr,
):  # fmt: skip
    """A persistent grid over (query block, head). See scoring.search_kernel."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(query.dtype, query.block_type.shape, query.layout)
    k_smem = gl.allocate_shared_memory(means.dtype, means.block_type.shape, means.layout)
    maxima = gl.allocate_shared_memory(gl.float32, [TILE], SHARED)
    lowest_smem = gl.allocate_shared_memory(gl.float32, [TILE], SHARED)
    highest_smem = gl.allocate_shared_memory(gl.float32, [TILE], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    phase = 0

    program = gl.program_id(0)
    scratch = scratch_ptr + program.to(gl.int64) * scratch_stride
    sizes = (offset, q_len, kv_len, rows, columns)
    rule = (sink_blocks, window_blocks, last_full_blocks)
    # the long rows first
    I = rows - 1 - program // heads
    batch_head = program % heads
    if _bounds(I, sizes, rule, FIRST_KEY)[3] > 0:
        _start(I, batch_head, query, means, HEADS, GROUP, q_smem, k_smem, ready)
    while I >= 0:
        visible, window_start, scored, steps, unmasked = _bounds(I, sizes, rule, FIRST_KEY)
        next_I = I - rows_step
        next_head = batch_head + heads_step
        if next_head >= heads:
            next_head -= heads
            next_I -= 1
        next_steps = _bounds(next_I, sizes, rule, FIRST_KEY)[3]
        threshold = 0.0
        if steps > 0:
            kv_head = batch_head // GROUP
            own_log2_alpha = log2_alpha
            if ALPHAS:
                own_log2_alpha = gl.load(log2_alphas_ptr + batch_head % HEADS)
            lowest = gl.full([TILE], 1.0, gl.float32, gl.SliceLayout(1, ACC))
            highest = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, ACC))
            shift = 0.0
            t = 0
            while t < steps:
                # tiles that need care: the first sets the shift, and the causal edge crosses others
                products, phase = _multiply(q_smem, k_smem, ready, phase, ACC)
                if t + 1 < steps:
                    _copy_means(kv_head, t + 1, means, k_smem, ready)
                elif next_steps > 0:
                    _start(next_I, next_head, query, means, HEADS, GROUP, q_smem, k_smem, ready)
                if t >= unmasked:
                    products = _hide(products, t, I, scored, offset, q_len, kv_len, ACC, FIRST_KEY)
                if t == 0:
                    of_tile = _share(maxima, gl.max(products, 1))
                    first = gl.arange(0, TILE, IN_EACH_WARP) == 0
                    shift = gl.max(gl.where(first, of_tile, float("-inf")), 0) * qk_scale
                    shift = gl.where(gl.abs(shift) < LARGE, shift, 0.0)
                lowest, highest = _score(products, t, scratch, scored, shift, lowest, highest, qk_scale, ACC, True)
                t += 1
                while t < unmasked:
                    products, phase = _multiply(q_smem, k_smem, ready, phase, ACC)
                    _copy_means(kv_head, t + 1, means, k_smem, ready)
                    lowest, highest = _score(products, t, scratch, scored, shift, lowest, highest, qk_scale, ACC, False)
                    t += 1
            # after this barrier all warps can read the row's scores
            lowest_smem.store(lowest)
            greatest = gl.max(_share(highest_smem, highest), 0)
            least = gl.min(lowest_smem.load(IN_EACH_WARP), 0)
            threshold = greatest * gl.exp2(own_log2_alpha)
            if (least == 0.0) | (greatest == float("inf")):
                # a sum left the range of float32, so score again, each block relative to its own largest product
                if next_steps > 0:
                    mbarrier.wait(ready, phase)
                    phase ^= 1
                barrier()
                _start(I, batch_head, query, means, HEADS, GROUP, q_smem, k_smem, ready)
                best = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, ACC))
                for t in range(0, steps):
                    products, phase = _multiply(q_smem, k_smem, ready, phase, ACC)
                    if t + 1 < steps:
                        _copy_means(kv_head, t + 1, means, k_smem, ready)
                    elif next_steps > 0:
                        _start(next_I, next_head, query, means, HEADS, GROUP, q_smem, k_smem, ready)
                    products = _hide(products, t, I, scored, offset, q_len, kv_len, ACC, FIRST_KEY)
                    best = _score_exactly(products, t, scratch, scored, best, qk_scale, ACC)
                threshold = gl.max(_share(maxima, best), 0) + own_log2_alpha
        elif next_steps > 0:
            _start(next_I, next_head, query, means, HEADS, GROUP, q_smem, k_smem, ready)
        words_row = words_ptr + (batch_head.to(gl.int64) * rows + I) * width
        _store_words(words_row, scratch, threshold, visible, window_start, scored, sink_blocks, width, WORDS)
        I = next_I
        batch_head = next_head
