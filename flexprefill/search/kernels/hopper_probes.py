"""The masses' kernel for Hopper: it does what probes.masses_kernel does, for the most common shape.

It is written in Gluon, like hopper.py. The tensor memory accelerator fills two buffers of keys in turn: while one block
of keys is multiplied and summed up, the next one arrives. Two programs share a multiprocessor, so one multiplies while
the other takes powers. The grid is not persistent: while one program starts, the other one works, and the GPU hands out
the rest as places become free.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.search.kernels import probes
from flexprefill.search.kernels.descriptors import described
from flexprefill.search.kernels.hopper_parts import barrier, fast_exp2, fast_log2

BLOCK = gl.constexpr(128)
ROWS = gl.constexpr(probes.TILE_ROWS)
SEGMENT = gl.constexpr(probes.SEGMENT)
WARPS, REGISTERS = 8, 128  # a cap for each thread, so that two programs share a multiprocessor

_tile_of, _probed_rows = gluon.jit(probes.tile_of.fn), gluon.jit(probes.probed_rows.fn)


def describe_keys(key: Tensor) -> TensorDescriptor:
    """Keys [B, Hkv, S_kv, D] as the kernel copies them, by block."""
    return described(key, 1, 1, BLOCK.value, key.shape[3])


@gluon.jit
def _copy_keys(key, batch, head, J, slot, k_smem, ready, pred):
    """Starts to copy key block J into a free buffer. Its barrier must expect it."""
    tma.async_copy_global_to_shared(key, [batch, head, J * BLOCK, 0], ready.index(slot), k_smem.index(slot), pred=pred)


@gluon.jit
def _multiply(q_smem, key, batch, head, J, J0, stop, k_smem, ready, ACC: gl.constexpr):
    """Waits for key block J and multiplies the probed rows with it: [rows, keys].

    Then it starts to copy the next but one into the same buffer.
    """
    slot = (J - J0) & 1
    mbarrier.wait(ready.index(slot), ((J - J0) >> 1) & 1)
    # here, and not before the copy, because that would take one more barrier
    mbarrier.expect(ready.index(slot), key.block_type.nbytes, pred=J + 2 < stop)
    keys = k_smem.index(slot).reshape([BLOCK, q_smem.shape[1]]).permute((1, 0))
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
    products = warpgroup_mma(q_smem, keys, zeros, use_acc=False)
    # every warp has read the buffer
    barrier()
    _copy_keys(key, batch, head, J + 2, slot, k_smem, ready, J + 2 < stop)
    return products


@gluon.jit
def _sum(terms, OF_ROWS: gl.constexpr):
    """Sums of rows, in two steps, because one long chain of additions in each thread would wait for itself."""
    return gl.convert_layout(gl.sum(gl.sum(gl.reshape(terms, [ROWS, 8, BLOCK // 8]), 1), 1), OF_ROWS)


@gluon.jit
def _weigh(products, best, total, factor, OF_ROWS: gl.constexpr):
    """Adds a key block's products to the rows' largest log2 weight and to their sum, which is relative to 2^best.

    Returns both and the log2 of the block's own sum. Hidden products are -inf. A block has the same bits whether some
    other rows of the tile see all of it or not.
    """
    top = gl.maximum(best, gl.max(products, 1) * factor)
    shift = gl.where(top == float("-inf"), 0.0, top)
    # fused by name, because the compiler may choose otherwise elsewhere
    mass = _sum(fast_exp2(gl.fma(products, factor, gl.full_like(products, 0.0) - shift[:, None])), OF_ROWS)
    return top, gl.fma(total, fast_exp2(best - shift), mass), shift + fast_log2(mass)


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = ["q_len", "kv_len", "first", "end", "first_set", "sets", "span_log2"]


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def masses_kernel(
    query_ptr, key, far_ptr, scratch_ptr, query_b, query_h, query_s, query_d, q_len, kv_len, first, end, first_set,
    sets, span_log2, HEADS, qk_scale, FAR: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr,
    PROBES_LOG2: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """A grid over (span of key blocks, tile of probed rows). See probes.masses_kernel. key is what describe_keys gives.

    qk_scale must be positive.
    """
    own_set, first_row, start, count, probes_log2, line, sums_line, J0, stop, whole = _tile_of(
        gl.program_id(0), first, end, sets, span_log2, q_len, kv_len, MEMBERS, PROBES_LOG2, BLOCK
    )
    if J0 >= stop:
        return
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    SETS: gl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    q_smem = gl.allocate_shared_memory(key.dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16, 2))
    k_smem = gl.allocate_shared_memory(key.dtype, [2, 1, 1, BLOCK, D], key.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    fence_async_shared()
    barrier()

    own_set += first_set
    kv_head = own_set // SETS
    batch = kv_head * GROUP // HEADS
    key_head = kv_head % (HEADS // GROUP)
    for slot in gl.static_range(2):
        mbarrier.expect(ready.index(slot), key.block_type.nbytes, pred=J0 + slot < stop)
    for slot in gl.static_range(2):
        _copy_keys(key, batch, key_head, J0 + slot, slot, k_smem, ready, J0 + slot < stop)
    gathered_r = gl.arange(0, ROWS, gl.SliceLayout(1, GATHERED))
    d = gl.arange(0, D, gl.SliceLayout(0, GATHERED))
    head, row = _probed_rows(
        first_row + gathered_r, own_set, start, count, probes_log2, far_ptr, q_len, FAR, GROUP, MEMBERS, BLOCK
    )
    # before the queries are waited for, so that all loads are on their way
    r = gl.arange(0, ROWS, OF_ROWS)
    _, own_row = _probed_rows(
        first_row + r, own_set, start, count, probes_log2, far_ptr, q_len, FAR, GROUP, MEMBERS, BLOCK
    )
    position = kv_len - q_len + own_row
    of_rows = query_ptr + batch.to(gl.int64) * query_b + (head - batch * HEADS).to(gl.int64) * query_h
    of_rows += row.to(gl.int64) * query_s
    q_smem.store(gl.load(of_rows[:, None] + d[None, :] * query_d))
    fence_async_shared()
    barrier()

    c = gl.arange(0, BLOCK, gl.SliceLayout(0, ACC))
    masses = scratch_ptr + line.to(gl.int64) * ROWS + r
    sums = scratch_ptr + sums_line.to(gl.int64) * ROWS + r
    for segment in range(J0 // SEGMENT, (stop + SEGMENT - 1) // SEGMENT):
        best = gl.full([ROWS], float("-inf"), gl.float32, OF_ROWS)
        total = gl.zeros([ROWS], gl.float32, OF_ROWS)
        for J in range(segment * SEGMENT, min((segment + 1) * SEGMENT, stop)):
            products = _multiply(q_smem, key, batch, key_head, J, J0, stop, k_smem, ready, ACC)
            if J >= whole:
                products = gl.where(c[None, :] <= (position - J * BLOCK)[:, None], products, float("-inf"))
            best, total, mass = _weigh(products, best, total, qk_scale, OF_ROWS)
            gl.store(masses + J * ROWS, mass)
        gl.store(sums + segment * ROWS, best + fast_log2(total))
