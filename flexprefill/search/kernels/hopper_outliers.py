"""The outliers' kernel for Hopper: it does what outliers.outliers_kernel does, for the most common shape.

It is written in Gluon, like hopper.py. A tile is a query block of one head. It goes in steps: over the rows' own keys,
then over the outliers. The tensor memory accelerator refills the one buffer while a step's products are looked at, and
loads the next tile's queries during the last step. A block is wanted or not, so warps exchange bits and no numbers, and
that only once in STEPS steps. The queries lie in shared memory, so their farthest rows are picked here too.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.search.kernels.descriptors import described
from flexprefill.search.kernels.hopper_parts import barrier, fast_exp2, fast_log2
from flexprefill.search.two_sided import OUTLIER_GROUP

BLOCK = gl.constexpr(128)
GROUP_BLOCKS = gl.constexpr(OUTLIER_GROUP)  # a step looks at the outliers of so many key blocks
STEPS = gl.constexpr(32)  # steps whose words are written together: one for each lane
LARGE = gl.constexpr(1e38)  # more than any log2 weight
REGISTERS = 128  # a cap for each thread


def warps(count: int) -> int:
    """Warps of a program for so many outliers of a block. Each thread has 64 products of a step."""
    return 4 * count


def programs(count: int) -> int:
    """Programs that share a multiprocessor."""
    return 4 // count


def describe(query: Tensor, key: Tensor, outliers: Tensor) -> tuple[TensorDescriptor, ...]:
    """Queries, keys [B, Hkv, S_kv, D] and outliers [B, Hkv, N, COUNT, D] as the kernel copies them."""
    head_dim, count = query.shape[3], outliers.shape[3]
    tile = GROUP_BLOCKS.value * count
    in_a_row = outliers.view(-1, outliers.shape[2] * count, head_dim)
    return (
        described(query, 1, 1, BLOCK.value, head_dim),
        described(key, 1, 1, tile, head_dim),
        described(in_a_row, 1, tile, head_dim),
    )


@gluon.jit
def _task(tile, sizes, GROUP: gl.constexpr, TILE: gl.constexpr):
    """A tile's query block and head, its key head, the first row's key block, the visible blocks, and its steps.

    The steps are those over the rows' own keys, and those over outliers.
    """
    q_len, kv_len, rows, heads = sizes
    I = rows - 1 - tile // heads
    batch_head = tile % heads
    offset = kv_len - q_len
    first_own = (offset + I * BLOCK) // BLOCK
    last = offset + gl.minimum((I + 1) * BLOCK, q_len) - 1
    visible = last // BLOCK + 1
    near_steps = (last - first_own * BLOCK) // TILE + 1
    far_steps = (visible - 1 + GROUP_BLOCKS - 1) // GROUP_BLOCKS
    return I, batch_head, batch_head // GROUP, first_own, visible, near_steps, far_steps


@gluon.jit
def _copy_keys(kv_head, at, key, k_smem, ready, KV_HEADS: gl.constexpr):
    """Starts to copy the rows' own keys, from position at on. Its barrier must expect them."""
    tma.async_copy_global_to_shared(
        key, [kv_head // KV_HEADS, kv_head % KV_HEADS, at, 0], ready, k_smem.reshape(key.block_type.shape)
    )


@gluon.jit
def _start(tile, sizes, query, key, q_smem, k_smem, ready, HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Starts to copy a tile's queries and the first of their own keys. Their barrier must expect them."""
    TILE: gl.constexpr = k_smem.shape[0]
    I, batch_head, kv_head, first_own, _, _, _ = _task(tile, sizes, GROUP, TILE)
    tma.async_copy_global_to_shared(query, [batch_head // HEADS, batch_head % HEADS, I * BLOCK, 0], ready, q_smem)
    _copy_keys(kv_head, first_own * BLOCK, key, k_smem, ready, HEADS // GROUP)


@gluon.jit
def _multiply(step, more, rows, task, copies, ACC: gl.constexpr):
    """Waits for the keys of the program's step and multiplies rows of queries with them: [rows, keys].

    Their buffer is then free. more says that the tile has more steps.
    """
    _, _, next_tile = task
    tiles, _, query, key, _, _, k_smem, ready = copies
    another = next_tile < tiles
    mbarrier.wait(ready, step & 1)
    # what comes next is expected here, because that saves a barrier
    mbarrier.expect(ready, key.block_type.nbytes, pred=more)
    mbarrier.expect(ready, query.block_type.nbytes + key.block_type.nbytes, pred=(more == 0) & another)
    ROWS: gl.constexpr = rows.shape[0]
    TILE: gl.constexpr = k_smem.shape[0]
    zeros = gl.zeros([ROWS, TILE], gl.float32, ACC)
    products = warpgroup_mma(rows, k_smem.permute((1, 0)), zeros, use_acc=False)
    # every warp has read the buffer
    barrier()
    return products


@gluon.jit
def _copy_outliers(t, task, copies, HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Starts to copy the outliers of step t, or what the next tile starts with if there are no more.

    The barrier must expect it.
    """
    kv_head, far_steps, next_tile = task
    tiles, sizes, query, key, outliers, q_smem, k_smem, ready = copies
    TILE: gl.constexpr = k_smem.shape[0]
    if t < far_steps:
        place = [kv_head, t * TILE, 0]
        tma.async_copy_global_to_shared(outliers, place, ready, k_smem.reshape(outliers.block_type.shape))
    elif next_tile < tiles:
        _start(next_tile, sizes, query, key, q_smem, k_smem, ready, HEADS, GROUP)


@gluon.jit
def _distances(vectors, mean):
    """Squares of the distances of rows [n, D] from their mean."""
    difference = vectors.to(gl.float32) - mean[None, :]
    return gl.sum(difference * difference, 1)


@gluon.jit
def _pick(q_smem, far, size, FAR: gl.constexpr, WARPS: gl.constexpr):
    """Writes the places of the rows farthest from their mean, int32 [FAR], as farthest.farthest_kernel finds them."""
    D: gl.constexpr = q_smem.shape[3]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    IN_EACH_WARP: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    # by halves, because all of it does not fit into registers
    q_smem = q_smem.reshape([BLOCK, D])
    upper = q_smem.slice(0, BLOCK // 2)
    lower = q_smem.slice(BLOCK // 2, BLOCK // 2)
    mean = gl.sum(upper.load(ROWS).to(gl.float32) + lower.load(ROWS).to(gl.float32), 0) / size.to(gl.float32)
    # behind this they are read again
    barrier()
    distance = _both(_distances(upper.load(ROWS), mean), _distances(lower.load(ROWS), mean), IN_EACH_WARP)
    s = gl.arange(0, BLOCK, IN_EACH_WARP)
    # distances are not negative, so their bits are in their order; what is not a number stands first
    bits = gl.where(distance == distance, distance.to(gl.int32, bitcast=True), 0x7FFFFFFF)
    order = gl.where(s < size, bits, -1)
    left = order
    found = 0
    for i in gl.static_range(FAR):
        # a block of fewer rows names them again
        left = gl.where(found == size, order, left)
        found = gl.where(found == size, 1, found + 1)
        # of as far ones the first
        index = gl.min(gl.where(left == gl.max(left, 0), s, BLOCK), 0)
        left = gl.where(s == index, -2, left)
        gl.store(far + i, index)


@gluon.jit
def _from(n):
    """A word with bits n and above set: all for n < 0, none for n > 31. PTX defines that shift, LLVM does not."""
    return gl.inline_asm_elementwise(
        "{ .reg .s32 n; max.s32 n, $1, 0; shl.b32 $0, -1, n; }", "=r,r", [n], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit
def _and(a, b):
    return a & b


@gluon.jit
def _up_to(products, last, ACC: gl.constexpr):
    """Puts -inf behind the row's column last."""
    n = gl.arange(0, products.shape[1], gl.SliceLayout(0, ACC))
    return gl.where(n[None, :] <= last[:, None], products, float("-inf"))


@gluon.jit
def _weigh(products, best, total, qk_scale):
    """Adds keys to the rows' log2-sum-exp: log2 of the largest weight, and the sum relative to it."""
    top = gl.maximum(best, gl.max(products, 1) * qk_scale)
    shift = gl.where(top == float("-inf"), 0.0, top)
    terms = fast_exp2(gl.fma(products, qk_scale, gl.full_like(products, 0.0) - shift[:, None]))
    return top, gl.fma(total, fast_exp2(best - shift), gl.sum(terms, 1))


@gluon.jit
def _weigh_own(
    step, steps, own, task, copies, qk_scale, HEADS: gl.constexpr, GROUP: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """The rows' log2-sum-exp over the keys of their own block, up to themselves. The rows may lie in two key blocks."""
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    first_own, position = own
    kv_head, far_steps, _ = task
    _, _, _, key, _, q_smem, k_smem, ready = copies
    TILE: gl.constexpr = k_smem.shape[0]
    rows = q_smem.reshape([BLOCK, k_smem.shape[1]])
    n = gl.arange(0, TILE, gl.SliceLayout(0, ACC))
    best = gl.full([BLOCK], float("-inf"), gl.float32, OF_ROWS)
    total = gl.zeros([BLOCK], gl.float32, OF_ROWS)
    for s in range(0, steps):
        at = first_own * BLOCK + s * TILE
        more = (s + 1 < steps) | (far_steps > 0)
        products = _multiply(step + s, more, rows, task, copies, ACC)
        if s + 1 < steps:
            _copy_keys(kv_head, at + TILE, key, k_smem, ready, HEADS // GROUP)
        else:
            _copy_outliers(0, task, copies, HEADS, GROUP)
        products = _up_to(products, position - at, ACC)
        # a row in the second block does not see the first one
        hidden = n[None, :] < (position // BLOCK * BLOCK - at)[:, None]
        best, total = _weigh(gl.where(hidden, float("-inf"), products), best, total, qk_scale)
    return best, total


@gluon.jit
def _weigh_halves(
    step, steps, own, task, copies, qk_scale, HEADS: gl.constexpr, GROUP: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """As _weigh_own, for rows of one key block, which has two steps of keys. Its upper half does not see the second."""
    HALF: gl.constexpr = BLOCK // 2
    OF_HALF: gl.constexpr = gl.SliceLayout(1, ACC)
    first_own, _ = own
    kv_head, far_steps, _ = task
    _, _, _, key, _, q_smem, k_smem, ready = copies
    rows = q_smem.reshape([BLOCK, k_smem.shape[1]])
    r = gl.arange(0, HALF, OF_HALF)
    none = gl.full([HALF], float("-inf"), gl.float32, OF_HALF)
    products = _multiply(step, (steps > 1) | (far_steps > 0), rows, task, copies, ACC)
    if steps > 1:
        _copy_keys(kv_head, first_own * BLOCK + HALF, key, k_smem, ready, HEADS // GROUP)
    else:
        _copy_outliers(0, task, copies, HEADS, GROUP)
    upper, lower = gl.split(gl.permute(gl.reshape(products, [2, HALF, HALF]), (1, 2, 0)))
    upper = _up_to(gl.convert_layout(upper, ACC), r, ACC)
    upper_best, upper_total = _weigh(upper, none, gl.zeros([HALF], gl.float32, OF_HALF), qk_scale)
    lower = gl.convert_layout(lower, ACC)
    best, total = _weigh(lower, none, gl.zeros([HALF], gl.float32, OF_HALF), qk_scale)
    if steps > 1:
        lower = _multiply(step + 1, far_steps > 0, rows.slice(HALF, HALF), task, copies, ACC)
        _copy_outliers(0, task, copies, HEADS, GROUP)
        best, total = _weigh(_up_to(lower, r, ACC), best, total, qk_scale)
    return _both(upper_best, best, OF_HALF), _both(upper_total, total, OF_HALF)


@gluon.jit
def _both(upper, lower, LAYOUT: gl.constexpr):
    """Two halves of the rows, one behind the other."""
    both = gl.reshape(gl.permute(gl.join(upper, lower), (1, 0)), [2 * upper.shape[0]])
    return gl.convert_layout(both, LAYOUT)


@gluon.jit
def _hide(products, t, first_own, split, position, COUNT: gl.constexpr, ACC: gl.constexpr):
    """Puts -inf where a block is not behind the row. split says that rows lie in two key blocks."""
    block = t * GROUP_BLOCKS + gl.arange(0, products.shape[1], gl.SliceLayout(0, ACC)) // COUNT
    if split:
        products = gl.where(block[None, :] < (position // BLOCK)[:, None], products, float("-inf"))
    else:
        products = gl.where(block[None, :] < first_own, products, float("-inf"))
    return products


@gluon.jit
def _add(near, far):
    """log2 of 2^near + 2^far."""
    return gl.maximum(near, far) + fast_log2(1.0 + fast_exp2(0.0 - gl.abs(near - far)))


@gluon.jit
def _wanted(products, limit, qk_scale, COUNT: gl.constexpr, WORDS: gl.constexpr):
    """The words of a step, as each warp's rows want them: int32 [warps, 2].

    Rows and outliers are split as the product's layout has them, so that all is in one thread but the last step.
    """
    WARPS: gl.constexpr = 4 * COUNT
    excess = gl.fma(products, qk_scale, gl.full_like(products, 0.0) - limit[:, None])
    # only the sign matters, so rows are joined as integers; a NaN's is plus here, so it is not below the limit
    below = excess.to(gl.int32, bitcast=True)
    # [repeats, warps, halves, lanes / 4, outliers] over repeats and halves
    below = gl.reshape(below, [2 // COUNT, WARPS, 2, 8, 64 * COUNT])
    below = gl.reduce(gl.reduce(below, 2, _and), 0, _and)
    below = gl.reshape(below, [WARPS, 8, 2, 4 * COUNT, 4, 2])
    if COUNT == 2:
        below = gl.expand_dims(gl.reduce(below, 5, _and), 5)
    bits = gl.where(below < 0, 0, _places(below, COUNT))
    bits = gl.sum(gl.sum(bits, 5), 3)
    bits = gl.convert_layout(gl.reshape(gl.permute(bits, (0, 2, 1, 3)), [WARPS, 2, 32]), WORDS)
    return gl.reduce(bits, 2, _or)


@gluon.jit
def _places(below, COUNT: gl.constexpr):
    """The bit in its word of each block, for values [warps, 8, words, 4 * COUNT, 4, 2 // COUNT]."""
    LAYOUT: gl.constexpr = below.type.layout
    OF_STEP: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, gl.SliceLayout(5, LAYOUT))))
    )
    OF_LANE: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(5, LAYOUT))))
    )
    OF_PAIR: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))))
    )
    PAIR: gl.constexpr = 2 // COUNT
    step = gl.arange(0, 4 * COUNT, OF_STEP)[None, None, None, :, None, None]
    lane = gl.arange(0, 4, OF_LANE)[None, None, None, None, :, None]
    pair = gl.arange(0, PAIR, OF_PAIR)[None, None, None, None, None, :]
    return 1 << ((step * 4 + lane) * PAIR + pair)


@gluon.jit
def _store_words(
    words_row, wanted, w0, visible, window_start, sink_blocks, width, FOUND: gl.constexpr, WORDS: gl.constexpr
):  # fmt: skip
    """Writes 2 * STEPS words from what each warp's rows want, int32 [warps, 2, STEPS], and what is always kept."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, WORDS)
    half = gl.arange(0, 2, gl.SliceLayout(1, LAYOUT))[:, None]
    t = gl.arange(0, STEPS, gl.SliceLayout(0, LAYOUT))[None, :]
    w = w0 + t * 2 + half
    first = w * 32
    bits = gl.reduce(wanted, 0, _or) & ~_from(visible - 1 - first)
    bits = (bits | ~_from(sink_blocks - first) | _from(window_start - first)) & ~_from(visible - first)
    if FOUND:
        bits = bits | gl.load(words_row + w, mask=w < width, other=0)
    gl.store(words_row + w, bits, mask=w < width)


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "width", "tiles", "far_blocks", "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def outliers_kernel(
    query, key, outliers, words_ptr, far_ptr, q_len, kv_len, rows, width, tiles, far_blocks, qk_scale, log2_share,
    sink_blocks, window_blocks, last_full_blocks, HEADS: gl.constexpr, GROUP: gl.constexpr, COUNT: gl.constexpr,
    D: gl.constexpr, FAR: gl.constexpr, FOUND: gl.constexpr,
):  # fmt: skip
    """A persistent grid over (query block, head). See outliers.outliers_kernel.

    query, key and outliers are what describe gives. qk_scale is above 0. For the first far_blocks query blocks of each
    head it also writes the FAR rows farthest from their mean: int32 [B, HEADS, rows, FAR].
    """
    WARPS: gl.constexpr = 4 * COUNT
    TILE: gl.constexpr = GROUP_BLOCKS * COUNT
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 2, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    q_smem = gl.allocate_shared_memory(query.dtype, query.block_type.shape, query.layout)
    k_smem = gl.allocate_shared_memory(key.dtype, [1, TILE, D], outliers.layout).reshape([TILE, D])
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    barrier()

    sizes = (q_len, kv_len, rows, tiles // rows)
    copies = (tiles, sizes, query, key, outliers, q_smem, k_smem, ready)
    all_rows = q_smem.reshape([BLOCK, D])
    offset = kv_len - q_len
    r = gl.arange(0, BLOCK, OF_ROWS)
    lane = gl.arange(0, STEPS, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    # the long rows first, there and back: the program with the longest one gets the shortest next
    tile = gl.program_id(0)
    ahead = 2 * (gl.num_programs(0) - tile) - 1
    step = 0
    if tile < tiles:
        mbarrier.expect(ready, query.block_type.nbytes + key.block_type.nbytes)
        _start(tile, sizes, query, key, q_smem, k_smem, ready, HEADS, GROUP)
    while tile < tiles:
        I, batch_head, kv_head, first_own, visible, near_steps, far_steps = _task(tile, sizes, GROUP, TILE)
        next_tile = tile + ahead
        ahead = 2 * gl.num_programs(0) - ahead
        if I < far_blocks:
            mbarrier.wait(ready, step & 1)
            far = far_ptr + (batch_head.to(gl.int64) * rows + I) * FAR
            _pick(q_smem, far, gl.minimum(q_len - I * BLOCK, BLOCK), FAR, WARPS)
        position = offset + I * BLOCK + r
        task = (kv_head, far_steps, next_tile)
        own = (first_own, position)
        # with two outliers a block, all own keys are one step
        if COUNT > 1:  # noqa: SIM114 — compiled or not
            best, total = _weigh_own(step, near_steps, own, task, copies, qk_scale, HEADS, GROUP, ACC)
        elif visible - 1 > first_own:
            best, total = _weigh_own(step, near_steps, own, task, copies, qk_scale, HEADS, GROUP, ACC)
        else:
            best, total = _weigh_halves(step, near_steps, own, task, copies, qk_scale, HEADS, GROUP, ACC)
        step += near_steps
        # a key must reach log2_share more than what the row sees in all, so both sides are raised by that
        near = best + fast_log2(total) + log2_share
        # rows behind the end decide nothing
        near = gl.where(position < kv_len, near, LARGE)
        largest = gl.full([BLOCK], float("-inf"), gl.float32, OF_ROWS)
        words_row = words_ptr + (batch_head.to(gl.int64) * rows + I) * width
        window_start = gl.where(I >= rows - last_full_blocks, 0, visible - window_blocks)
        for w0 in range(0, width, 2 * STEPS):
            wanted = gl.zeros([WARPS, 2, STEPS], gl.int32, WORDS)
            for t in range(w0 // 2, gl.minimum(w0 // 2 + STEPS, far_steps)):
                products = _multiply(step + t, t + 1 < far_steps, all_rows, task, copies, ACC)
                _copy_outliers(t + 1, task, copies, HEADS, GROUP)
                if (t + 1) * GROUP_BLOCKS > first_own:
                    products = _hide(products, t, first_own, visible - 1 > first_own, position, COUNT, ACC)
                largest = gl.maximum(largest, gl.max(products, 1))
                limit = _add(near, gl.fma(largest, qk_scale, gl.full_like(largest, 0.0) + log2_share))
                bits = _wanted(products, limit, qk_scale, COUNT, WORDS)
                wanted = gl.where(lane == t - w0 // 2, gl.expand_dims(bits, 2), wanted)
            _store_words(words_row, wanted, w0, visible, window_start, sink_blocks, width, FOUND, WORDS)
        step += far_steps
        tile = next_tile
