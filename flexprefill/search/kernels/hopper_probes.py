"""The probes' kernel for Hopper: it does what probes.probes_kernel does, for the most common shape.

It is written in Gluon, like hopper.py. The tensor memory accelerator fills two buffers of keys in turn: while one block
of keys is multiplied and summed up, the next one arrives. Two programs share a multiprocessor, so one multiplies while
the other takes powers.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.runtime.state import remembered
from flexprefill.search import two_sided
from flexprefill.search.kernels.outliers import always_bits

NEIGHBOUR_SHARE = gl.constexpr(two_sided.NEIGHBOUR_SHARE)
BLOCK = gl.constexpr(128)
ROWS = gl.constexpr(128)  # probed rows of a tile
WORDS = gl.constexpr(8)  # a step of the decision: one for each warp
STEP = gl.constexpr(8)  # key blocks of each of those words, a step
WARPS, PROGRAMS, REGISTERS = 8, 2, 128  # programs: a multiprocessor; registers: a cap for each thread

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name before and since triton 3.7
_always_bits = gluon.jit(always_bits.fn)


@remembered("key blocks of a head dimension, as the tensor memory accelerator copies them", most=16)
def _block(head_dim: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape and layout of a key block in shared memory."""
    shape = [1, 1, BLOCK.value, head_dim]
    return shape, gl.NVMMASharedLayout.get_default_for(shape, gl.float16)


def describe_keys(key: Tensor) -> TensorDescriptor:
    """Keys [B, Hkv, S_kv, D] as the kernel copies them, by block. Rows behind the end come as zeros."""
    return TensorDescriptor.from_tensor(key, *_block(key.shape[3]))


@gluon.jit
def _bounds(I0, offset, q_len, end, NUMBER: gl.constexpr):
    """How many key blocks all rows of the tile at query block I0 see whole, and how many some row can see."""
    last = offset + gl.minimum(gl.minimum(I0 + NUMBER, end) * BLOCK, q_len) - 1
    return (offset + I0 * BLOCK + 1) // BLOCK, last // BLOCK + 1


@gluon.jit
def _copy_keys(key, batch, kv_head, J, slot, k_smem, ready):
    """Starts to copy key block J. Its barrier must expect it."""
    tma.async_copy_global_to_shared(key, [batch, kv_head, J * BLOCK, 0], ready.index(slot), k_smem.index(slot))


@gluon.jit
def _start(key, kv_head, seen, step, kv_heads, k_smem, ready):
    """Starts to copy a tile's first key blocks, the program's step-th and next. Both buffers must be free."""
    for J in gl.static_range(2):
        slot = (step + J) & 1
        if seen > J:
            mbarrier.expect(ready.index(slot), key.block_type.nbytes)
            _copy_keys(key, kv_head // kv_heads, kv_head % kv_heads, J, slot, k_smem, ready)


@gluon.jit
def _multiply(q_smem, key, batch, kv_head, J, seen, step, k_smem, ready, ACC: gl.constexpr):
    """Waits for key block J, the program's step-th, and multiplies the probed rows with it: [rows, keys].

    Then it starts to copy the next but one into the same buffer.
    """
    slot = step & 1
    mbarrier.wait(ready.index(slot), (step >> 1) & 1)
    mbarrier.expect(ready.index(slot), key.block_type.nbytes, pred=J + 2 < seen)
    keys = k_smem.index(slot).reshape([BLOCK, q_smem.shape[1]]).permute((1, 0))
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
    products = warpgroup_mma(q_smem, keys, zeros, use_acc=False)
    # every warp has read the buffer
    _barrier()
    if J + 2 < seen:
        _copy_keys(key, batch, kv_head, J + 2, slot, k_smem, ready)
    return products


@gluon.jit
def _exp2(x):
    """2^x. What is too small for a normal number is 0, which saves three instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    """log2 of a sum that _exp2 made, so no number below the normal ones."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _sum(terms, OF_ROWS: gl.constexpr):
    """Sums of rows, in two steps, because one long chain of additions in each thread would wait for itself."""
    return gl.convert_layout(gl.sum(gl.sum(gl.reshape(terms, [ROWS, 8, BLOCK // 8]), 1), 1), OF_ROWS)


@gluon.jit
def _weigh(products, best, total, factor, OF_ROWS: gl.constexpr):
    """Adds a key block that all rows see whole. Returns the rows' largest logit and their sum, and the block's mass.

    All are log2 but the sum, which is relative to 2^best.
    """
    top = gl.maximum(best, gl.max(products, 1) * factor)
    mass = _sum(_exp2(gl.fma(products, factor, gl.full_like(products, 0.0) - top[:, None])), OF_ROWS)
    return top, gl.fma(total, _exp2(best - top), mass), top + _log2(mass)


@gluon.jit
def _weigh_seen(products, J, position, best, total, factor, ACC: gl.constexpr, OF_ROWS: gl.constexpr):
    """Adds a key block of which a row sees the keys up to its position. See _weigh."""
    c = gl.arange(0, BLOCK, gl.SliceLayout(0, ACC))
    x = gl.where(c[None, :] <= (position - J * BLOCK)[:, None], products * factor, float("-inf"))
    top = gl.maximum(best, gl.max(x, 1))
    shift = gl.where(top == float("-inf"), 0.0, top)
    mass = _sum(_exp2(x - shift[:, None]), OF_ROWS)
    return top, gl.fma(total, _exp2(best - shift), mass), shift + _log2(mass)


@gluon.jit
def _rows_of(
    r, I0, kv_head, set_in_group, far_ptr, q_len, rows, end, HEADS, FAR: gl.constexpr, GROUP: gl.constexpr,
    MEMBERS: gl.constexpr, PROBES: gl.constexpr,
):  # fmt: skip
    """The query heads, counted through the batch, and the rows in the sequence of a tile's rows r."""
    EVEN: gl.constexpr = (PROBES + 1) // 2
    i = r % PROBES
    member = gl.minimum(set_in_group * MEMBERS + r // PROBES % MEMBERS, GROUP - 1)
    I = gl.minimum(I0 + r // (MEMBERS * PROBES), end - 1)
    size = gl.minimum(q_len - I * BLOCK, BLOCK)
    head = kv_head * GROUP + member
    row = (2 * (i * GROUP + member) + 1) * size // (2 * GROUP * EVEN)
    if PROBES > 1:
        far = gl.load(far_ptr + (head.to(gl.int64) * rows + I) * FAR + gl.maximum(i - EVEN, 0))
        row = gl.where(i < EVEN, row, far)
    return head, I * BLOCK + row


@gluon.jit
def _words_at(I0, kv_head, set_in_group, rows, end, GROUP: gl.constexpr, MEMBERS: gl.constexpr, n, m):
    """Places among the rows of words for query blocks n and members m of a tile, and whether there are such."""
    member = set_in_group * MEMBERS + m
    return (kv_head * GROUP + member).to(gl.int64) * rows + I0 + n, (member < GROUP) & (I0 + n < end)


@gluon.jit
def _decide(
    scratch, words_ptr, held_ptr, I0, kv_head, set_in_group, seen, offset, q_len, rows, width, end, probe_share,
    sink_blocks, window_blocks, last_full_blocks, GROUP: gl.constexpr, MEMBERS: gl.constexpr, NUMBER: gl.constexpr,
    PROBES: gl.constexpr, FOUND: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """Writes a tile's words, and with HELD how much the kept blocks hold, from the masses in scratch.

    Each warp has words of its own and all rows, so no warp waits for another.
    """
    EVEN: gl.constexpr = (PROBES + 1) // 2
    # four neighbouring rows in each thread: of probes, then members, then query blocks
    P: gl.constexpr = PROBES if PROBES < 4 else 4
    M: gl.constexpr = MEMBERS if MEMBERS < 4 // P else 4 // P
    N: gl.constexpr = 4 // (P * M)
    LOADED: gl.constexpr = gl.BlockedLayout([1, STEP, 4], [1, 1, 32], [WORDS, 1, 1], [2, 1, 0])
    # the same, with the rows as [query block, member, probe]
    SHARES: gl.constexpr = gl.BlockedLayout(
        [1, STEP, N, M, P], [1, 1, NUMBER // N, MEMBERS // M, PROBES // P], [WORDS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    MEANS: gl.constexpr = gl.SliceLayout(4, SHARES)
    OF_WORDS: gl.constexpr = gl.SliceLayout(1, MEANS)
    OF_HELD: gl.constexpr = gl.SliceLayout(0, OF_WORDS)

    r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, LOADED)))[None, None, :]
    loaded_w = gl.arange(0, WORDS, gl.SliceLayout(1, gl.SliceLayout(2, LOADED)))[:, None, None]
    loaded_j = gl.arange(0, STEP, gl.SliceLayout(0, gl.SliceLayout(2, LOADED)))[None, :, None]
    sums = gl.load(scratch + width * 32 * ROWS + r)

    w = gl.arange(0, WORDS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, MEANS))))[:, None, None, None]
    j = gl.arange(0, STEP, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, MEANS))))[None, :, None, None]
    n = gl.arange(0, NUMBER, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, MEANS))))[None, None, :, None]
    m = gl.arange(0, MEMBERS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, MEANS))))[None, None, None, :]
    i = gl.arange(0, PROBES, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, SHARES)))))
    visible = (offset + gl.minimum((I0 + n + 1) * BLOCK, q_len) - 1) // BLOCK + 1

    word = gl.arange(0, WORDS, gl.SliceLayout(1, gl.SliceLayout(2, OF_WORDS)))[:, None, None]
    word_n = gl.arange(0, NUMBER, gl.SliceLayout(0, gl.SliceLayout(2, OF_WORDS)))[None, :, None]
    word_m = gl.arange(0, MEMBERS, gl.SliceLayout(0, gl.SliceLayout(1, OF_WORDS)))[None, None, :]
    index, valid = _words_at(I0, kv_head, set_in_group, rows, end, GROUP, MEMBERS, word_n, word_m)
    at_words = words_ptr + index * width

    held = gl.zeros([WORDS, NUMBER, MEMBERS], gl.float32, OF_WORDS)
    for w0 in range(0, width, WORDS):
        inside = valid & (w0 + word < width)
        bits = gl.zeros([WORDS, NUMBER, MEMBERS], gl.int32, OF_WORDS)
        if FOUND:
            bits = gl.load(at_words + w0 + word, mask=inside, other=0)
        for j0 in range(0, 32, STEP):
            loaded_column = (w0 + loaded_w) * 32 + j0 + loaded_j
            L = gl.load(scratch + loaded_column * ROWS + r, mask=loaded_column < seen, other=float("-inf"))
            share = gl.reshape(_exp2(L - sums), [WORDS, STEP, NUMBER, MEMBERS, PROBES])
            share = gl.convert_layout(share, SHARES)
            mean = gl.sum(share, 4) / PROBES
            of_others = gl.where(set_in_group * MEMBERS + m < GROUP, mean, 0.0)
            strong = gl.expand_dims(gl.max(of_others, 3), 3) * NEIGHBOUR_SHARE >= probe_share
            column = (w0 + w) * 32 + j0 + j
            # a NaN is not below the share
            kept = (((mean < probe_share) == 0) | strong) & (column < visible)
            kept = kept | _always_bits(column, I0 + n, visible, rows, sink_blocks, window_blocks, last_full_blocks)
            if HELD:
                all_kept = kept
                if FOUND:
                    all_kept = kept | (((gl.expand_dims(bits, 1) >> (j0 + j)) & 1) != 0)
                of_even = gl.where((i < EVEN)[None, None, None, None, :], share, 0.0)
                held += gl.sum(gl.where(all_kept, gl.sum(of_even, 4), 0.0), 1)
            bits = bits | gl.sum(kept.to(gl.int32) << (j0 + j), 1)
        gl.store(at_words + w0 + word, bits, mask=inside)
    if HELD:
        held_n = gl.arange(0, NUMBER, gl.SliceLayout(1, OF_HELD))[:, None]
        held_m = gl.arange(0, MEMBERS, gl.SliceLayout(0, OF_HELD))[None, :]
        index, valid = _words_at(I0, kv_head, set_in_group, rows, end, GROUP, MEMBERS, held_n, held_m)
        gl.store(held_ptr + index, gl.sum(held, 0) / EVEN, mask=valid)


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "width", "first", "end", "tiles", "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def probes_kernel(
    query_ptr, key, far_ptr, words_ptr, held_ptr, scratch_ptr, query_b, query_h, query_s, query_d, scratch_stride,
    q_len, kv_len, rows, width, first, end, tiles, HEADS, qk_scale, probe_share, sink_blocks, window_blocks,
    last_full_blocks, FAR: gl.constexpr, GROUP: gl.constexpr, MEMBERS: gl.constexpr, NUMBER: gl.constexpr,
    PROBES: gl.constexpr, D: gl.constexpr, FOUND: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """A persistent grid over (NUMBER query blocks of first … end, MEMBERS query heads). See probes.probes_kernel.

    key is what describe_keys gives. The rows of a tile are ordered by query block, then head, then probe. There are
    ROWS of them. Scratch has a stretch of (32 · width + 1) · ROWS numbers for each program: the masses of each key
    block, then the rows' sums.
    """
    gl.static_assert(NUMBER * MEMBERS * PROBES == ROWS)
    SETS: gl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    q_smem = gl.allocate_shared_memory(key.dtype, [ROWS, D], gl.NVMMASharedLayout(128, 16, 2))
    k_smem = gl.allocate_shared_memory(key.dtype, [2, 1, 1, BLOCK, D], key.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    fence_async_shared()
    _barrier()

    program = gl.program_id(0)
    scratch = scratch_ptr + program.to(gl.int64) * scratch_stride
    offset = kv_len - q_len
    factor = qk_scale
    kv_heads = HEADS // GROUP
    groups = (end - first + NUMBER - 1) // NUMBER
    sets = tiles // groups
    r = gl.arange(0, ROWS, OF_ROWS)
    gathered_r = gl.arange(0, ROWS, gl.SliceLayout(1, GATHERED))
    d = gl.arange(0, D, gl.SliceLayout(0, GATHERED))
    # the long rows first, there and back: the program with the longest one gets the shortest next
    tile = program
    ahead = 2 * (gl.num_programs(0) - program) - 1
    I0 = first + (groups - 1 - tile // sets) * NUMBER
    whole, seen = _bounds(I0, offset, q_len, end, NUMBER)
    step = 0
    if tile < tiles:
        _start(key, tile % sets // SETS, seen, step, kv_heads, k_smem, ready)
    while tile < tiles:
        kv_head = tile % sets // SETS
        set_in_group = tile % sets % SETS
        heads, row = _rows_of(
            gathered_r, I0, kv_head, set_in_group, far_ptr, q_len, rows, end, HEADS, FAR, GROUP, MEMBERS, PROBES
        )
        of_rows = query_ptr + (heads // HEADS).to(gl.int64) * query_b + (heads % HEADS).to(gl.int64) * query_h
        of_rows += row.to(gl.int64) * query_s
        q = gl.load(of_rows[:, None] + d[None, :] * query_d)
        q_smem.store(q)
        fence_async_shared()
        _barrier()
        heads, row = _rows_of(
            r, I0, kv_head, set_in_group, far_ptr, q_len, rows, end, HEADS, FAR, GROUP, MEMBERS, PROBES
        )
        position = offset + row
        batch = kv_head // kv_heads
        head = kv_head % kv_heads
        best = gl.full([ROWS], float("-inf"), gl.float32, OF_ROWS)
        total = gl.zeros([ROWS], gl.float32, OF_ROWS)
        for J in range(0, whole):
            products = _multiply(q_smem, key, batch, head, J, seen, step + J, k_smem, ready, ACC)
            best, total, mass = _weigh(products, best, total, factor, OF_ROWS)
            gl.store(scratch + J * ROWS + r, mass)
        for J in range(whole, seen):
            products = _multiply(q_smem, key, batch, head, J, seen, step + J, k_smem, ready, ACC)
            best, total, mass = _weigh_seen(products, J, position, best, total, factor, ACC, OF_ROWS)
            gl.store(scratch + J * ROWS + r, mass)
        gl.store(scratch + width * 32 * ROWS + r, best + _log2(total))
        step += seen
        next_tile = tile + ahead
        ahead = 2 * gl.num_programs(0) - ahead
        next_I0 = first + (groups - 1 - next_tile // sets) * NUMBER
        next_whole, next_seen = _bounds(next_I0, offset, q_len, end, NUMBER)
        if next_tile < tiles:
            # the next tile's first keys arrive meanwhile
            _start(key, next_tile % sets // SETS, next_seen, step, kv_heads, k_smem, ready)
        # other threads wrote what is read now
        _barrier()
        _decide(
            scratch, words_ptr, held_ptr, I0, kv_head, set_in_group, seen, offset, q_len, rows, width, end, probe_share,
            sink_blocks, window_blocks, last_full_blocks, GROUP, MEMBERS, NUMBER, PROBES, FOUND, HELD,
        )  # fmt: skip
        # the next tile overwrites the scratch
        _barrier()
        tile = next_tile
        I0 = next_I0
        whole = next_whole
        seen = next_seen
