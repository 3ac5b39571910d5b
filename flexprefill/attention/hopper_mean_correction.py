"""Mean correction's kernel for Hopper: it does what mean_correction_kernel.merge_means_kernel does, for most calls.

It is written in Gluon, like search/kernels/hopper.py. A program has one query block of one head. The tensor memory
accelerator fills two buffers of means in turn: while one tile is multiplied, the next one arrives. Two programs share a
multiprocessor, so one multiplies while the other takes powers or merges. The output goes through the buffer of the
queries, in as soon as the last product with them is done, and out merged.
"""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.search.kernels.descriptors import described
from flexprefill.search.kernels.hopper_parts import barrier, fast_exp2

BLOCK = gl.constexpr(128)
BLOCK_LOG2 = gl.constexpr(7)
TILE = gl.constexpr(64)  # means a step, of two words
LN_2 = gl.constexpr(math.log(2))
WARPS, REGISTERS = 8, 128  # a cap for each thread, so that two programs share a multiprocessor


def describe(
    query: Tensor, key_means: Tensor, value_means: Tensor, output: Tensor, merged: Tensor
) -> dict[str, TensorDescriptor]:
    """The kernel's tensors as it copies them. Rows behind the end are not written.

    Args:
        query, output, merged: [B, Hq, S_q, D].
        key_means, value_means: [B, Hkv, N, D].
    """
    head_dim = query.shape[3]
    tensors = {"query": query, "output": output, "merged": merged}
    means = {"key_means": key_means.flatten(0, 1), "value_means": value_means.flatten(0, 1)}
    return {name: described(tensor, 1, 1, BLOCK.value, head_dim) for name, tensor in tensors.items()} | {
        name: described(tensor, 1, TILE.value, head_dim) for name, tensor in means.items()
    }


@gluon.jit
def _copy(means, kv_head, first, t, smem, ready, pred):
    """Starts to copy tile t of the means into its buffer, which must be free. Its barrier must expect it."""
    place = [kv_head, first + t * TILE, 0]
    tma.async_copy_global_to_shared(means, place, ready.index(t & 1), smem.index(t & 1), pred=pred)


@gluon.jit
def _word(words_row, w, width):
    """Word w of a row of the map. Before the first one all blocks count as kept."""
    return gl.load(words_row + w, mask=(w >= 0) & (w < width), other=-1)


@gluon.jit
def _shifted(low, high, by):
    """The 32 bits of two words from bit ``by`` < 32 of the lower one on."""
    return (((high.to(gl.int64) << 32) | (low.to(gl.int64) & 0xFFFFFFFF)) >> by).to(gl.int32)


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = ["q_len", "kv_len", "rows", "columns", "width", "heads"]


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_means_kernel(
    query, key_means, value_means, output, merged, words_ptr, lse_ptr, sums_ptr, q_len, kv_len, rows, columns, width,
    heads, HEADS, GROUP, qk_scale, D: gl.constexpr,
):  # fmt: skip
    """A grid over (query block, head). See mean_correction_kernel.merge_means_kernel.

    query, key_means, value_means, output and merged are what describe gives. heads are those of all batch entries.
    qk_scale is above 0.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TILE, 16])
    MEANS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    SHARES: gl.constexpr = gl.DotOperandLayout(0, MEANS, 2)
    OF_LOGITS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OF_MEANS: gl.constexpr = gl.SliceLayout(1, MEANS)
    q_smem = gl.allocate_shared_memory(query.dtype, query.block_type.shape, query.layout)
    k_smem = gl.allocate_shared_memory(key_means.dtype, [2, 1, TILE, D], key_means.layout)
    v_smem = gl.allocate_shared_memory(value_means.dtype, [2, 1, TILE, D], value_means.layout)
    # several, because between two uses of the same memory the compiler puts a barrier of all warps
    block_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(block_ready, count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()
    barrier()

    # the long rows first
    I = rows - 1 - gl.program_id(0) // heads
    batch_head = gl.program_id(0) % heads
    kv_head = batch_head // GROUP
    place = [batch_head // HEADS, batch_head % HEADS, I * BLOCK, 0]
    seen = kv_len - q_len + I * BLOCK + 1  # positions that every row of the query block sees
    whole = seen // BLOCK
    if seen == kv_len:
        # the last row is a query block of its own, and sees a short last key block to its end
        whole = columns
    steps = (whole + TILE - 1) // TILE
    # tiles end with the last of these blocks, so that no later value is there to be multiplied with a share of 0
    first = whole - steps * TILE
    mbarrier.expect(block_ready, query.block_type.nbytes)
    for i in gl.static_range(2):
        mbarrier.expect(k_ready.index(i), key_means.block_type.nbytes, pred=i < steps)
        mbarrier.expect(v_ready.index(i), value_means.block_type.nbytes, pred=i < steps)
    if steps > 0:
        tma.async_copy_global_to_shared(query, place, block_ready, q_smem)
    else:
        tma.async_copy_global_to_shared(output, place, block_ready, q_smem)
    for i in gl.static_range(2):
        _copy(key_means, kv_head, first, i, k_smem, k_ready, i < steps)
    _copy(value_means, kv_head, first, 0, v_smem, v_ready, steps > 0)

    row = I * BLOCK + gl.arange(0, BLOCK, OF_MEANS)
    of_rows = batch_head.to(gl.int64) * q_len + row
    kept = gl.load(lse_ptr + of_rows, mask=row < q_len, other=0.0) * (1 / LN_2)
    words_row = words_ptr + (batch_head.to(gl.int64) * rows + I) * width
    w = first >> 5
    words = (_word(words_row, w, width), _word(words_row, w + 1, width), _word(words_row, w + 2, width))
    j = gl.arange(0, TILE, gl.SliceLayout(0, LOGITS))
    best = gl.full([BLOCK], float("-inf"), gl.float32, OF_LOGITS)
    total = gl.zeros([BLOCK], gl.float32, OF_LOGITS)
    mean = gl.zeros([BLOCK, D], gl.float32, MEANS)
    if steps > 0:
        mbarrier.wait(block_ready, 0)
        mbarrier.expect(block_ready, output.block_type.nbytes)
    for t in range(0, steps):
        slot = t & 1
        # these arrive while the tile is multiplied
        next_words = (words[2], _word(words_row, w + 2 * t + 3, width), _word(words_row, w + 2 * t + 4, width))
        # every warp has read the values before
        barrier()
        _copy(value_means, kv_head, first, t + 1, v_smem, v_ready, t + 1 < steps)
        mbarrier.wait(k_ready.index(slot), (t >> 1) & 1)
        # both are expected half a step before their copies, because there it would take one more barrier
        mbarrier.expect(k_ready.index(slot), key_means.block_type.nbytes, pred=t + 2 < steps)
        keys = k_smem.index(slot).reshape([TILE, D]).permute((1, 0))
        zeros = gl.zeros([BLOCK, TILE], gl.float32, LOGITS)
        products = warpgroup_mma(q_smem.reshape([BLOCK, D]), keys, zeros, use_acc=False)
        mbarrier.wait(v_ready.index(slot), (t >> 1) & 1)
        # every warp has read the queries and these keys
        barrier()
        _copy(key_means, kv_head, first, t + 2, k_smem, k_ready, t + 2 < steps)
        mbarrier.expect(v_ready.index(slot), value_means.block_type.nbytes, pred=t + 2 < steps)
        if t + 1 == steps:
            tma.async_copy_global_to_shared(output, place, block_ready, q_smem)
            if seen == kv_len:
                # a short block has fewer keys than BLOCK, for which all blocks are taken here
                size = (kv_len - (columns - 1) * BLOCK).to(gl.float32)
                less = (gl.log2(size) - BLOCK_LOG2) / qk_scale
                products += gl.where(j == TILE - 1, less, 0.0)[None, :]
        lower = _shifted(words[0], words[1], first & 31)
        upper = _shifted(words[1], words[2], first & 31)
        if (lower | upper) != 0:
            # all bits of a thread's elements come from one shift
            bits = gl.where(j < 32, lower, upper) >> (j & 6)
            products = gl.where((bits & (1 << (j & 25)))[None, :] == 0, products, float("-inf"))
        higher = gl.maximum(best, gl.max(products, 1) * qk_scale)
        shift = gl.where(higher == float("-inf"), 0.0, higher)
        shares = fast_exp2(gl.fma(products, qk_scale, gl.full_like(products, 0.0) - shift[:, None]))
        fading = fast_exp2(best - shift)
        best = higher
        total = gl.fma(total, fading, gl.sum(shares, 1))
        shares = gl.convert_layout(shares.to(value_means.dtype), SHARES)
        mean *= gl.convert_layout(fading, OF_MEANS)[:, None]
        values = v_smem.index(slot).reshape([TILE, D])
        mean = warpgroup_mma(shares, values, mean)
        words = next_words

    best = gl.convert_layout(best, OF_MEANS) + BLOCK_LOG2
    higher = gl.maximum(best, kept)
    shift = gl.where(higher == float("-inf"), 0.0, higher)
    of_kept = gl.exp2(kept - shift)
    of_means = gl.exp2(best - shift)
    total = gl.convert_layout(total, OF_MEANS) * of_means + of_kept
    gl.store(sums_ptr + of_rows, (shift + gl.log2(total)) * LN_2, mask=row < q_len)
    # a row without anything stays zero
    share = 1.0 / gl.where(total == 0, 1.0, total)
    of_kept *= share
    # it was used once before if there were queries
    mbarrier.wait(block_ready, (steps > 0).to(gl.int32))
    block = q_smem.reshape([BLOCK, D])
    old = block.load(MEANS).to(gl.float32)
    # the output of a row that keeps nothing may hold anything
    old = gl.where(of_kept[:, None] > 0, old * of_kept[:, None], 0.0)
    block.store(gl.fma(mean, gl.zeros_like(mean) + (of_means * share)[:, None], old).to(merged.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(merged, place, q_smem)
    tma.store_wait(0)
