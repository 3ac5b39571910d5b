"""The outliers' kernel for Hopper: it does what outliers.outliers_kernel does, for the most common shape.

It is written in Gluon, like hopper.py. A tile is a query block of one head. It goes in steps: over the rows' own keys,
then over the outliers. The tensor memory accelerator refills the one buffer while a step's products are looked at, and
loads the next tile's queries during the last step. A block is wanted or not, so warps exchange bits and no numbers, and
that only once in STEPS steps.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.runtime.state import remembered
from flexprefill.search.kernels.hopper_parts import barrier, fast_exp2, fast_log2
from flexprefill.search.two_sided import OUTLIER_GROUP

BLOCK = gl.constexpr(128)
GROUP_BLOCKS = gl.constexpr(OUTLIER_GROUP)  # a step looks at the outliers of so many key blocks
STEPS = gl.constexpr(32)  # steps whose words are written together: one for each lane
LARGE = gl.constexpr(1e38)  # more than any log2 weight
REGISTERS = 128  # a cap for each thread


def warps(outliers: Tensor) -> int:
    """Warps of a program. Each thread has 64 products of a step."""
    return 4 * outliers.shape[3]


def programs(outliers: Tensor) -> int:
    """Programs that share a multiprocessor."""
    return 4 // outliers.shape[3]


@remembered("blocks of a head dimension, as the tensor memory accelerator copies outliers", most=16)
def _blocks(head_dim: int, count: int) -> list[tuple[list[int], gl.NVMMASharedLayout]]:
    """Shapes and layouts of a query block, a tile of keys and a tile of outliers in shared memory."""
    tile = GROUP_BLOCKS.value * count
    shapes = [1, 1, BLOCK.value, head_dim], [1, 1, tile, head_dim], [1, tile, head_dim]
    return [(shape, gl.NVMMASharedLayout.get_default_for(shape, gl.float16)) for shape in shapes]


def describe(query: Tensor, key: Tensor, outliers: Tensor) -> list[TensorDescriptor]:
    """Queries, keys [B, Hkv, S_kv, D] and outliers [B, Hkv, N, COUNT, D] as the kernel copies them.

    Rows behind the end come as zeros.
    """
    tensors = query, key, outliers.flatten(2, 3).flatten(0, 1)
    blocks = _blocks(query.shape[3], outliers.shape[3])
    return [TensorDescriptor.from_tensor(tensor, *block) for tensor, block in zip(tensors, blocks, strict=True)]


@gluon.jit
def _task(tile, tiles, q_len, kv_len, rows, HEADS, GROUP, TILE: gl.constexpr):
    """A tile's query block and head, its key head, the first row's key block, the visible blocks, and its steps.

    The steps are those over the rows' own keys, and those over outliers.
    """
    heads = tiles // rows
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
def _copy_keys(kv_head, kv_heads, at, key, k_smem, ready):
    """Starts to copy the rows' own keys, from position at on. Its barrier must expect them."""
    tma.async_copy_global_to_shared(
        key, [kv_head // kv_heads, kv_head % kv_heads, at, 0], ready, k_smem.reshape(key.block_type.shape)
    )


@gluon.jit
def _start(tile, sizes, query, key, q_smem, k_smem, ready):
    """Starts to copy a tile's queries and the first of their own keys. Their barrier must expect them."""
    TILE: gl.constexpr = k_smem.shape[0]
    tiles, q_len, kv_len, rows, HEADS, GROUP = sizes
    I, batch_head, kv_head, first_own, _, _, _ = _task(tile, tiles, q_len, kv_len, rows, HEADS, GROUP, TILE)
    tma.async_copy_global_to_shared(query, [batch_head // HEADS, batch_head % HEADS, I * BLOCK, 0], ready, q_smem)
    _copy_keys(kv_head, HEADS // GROUP, first_own * BLOCK, key, k_smem, ready)


@gluon.jit
def _multiply(step, more, another, query, key, q_smem, k_smem, ready, ACC: gl.constexpr):
    """Waits for the keys of the program's step and multiplies the queries with them: [rows, keys].

    Their buffer is then free. more says that the tile has more steps, and another that another tile follows.
    """
    TILE: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    mbarrier.wait(ready, step & 1)
    # what comes next is expected here, because that saves a barrier
    mbarrier.expect(ready, key.block_type.nbytes, pred=more)
    mbarrier.expect(ready, query.block_type.nbytes + key.block_type.nbytes, pred=(more == 0) & another)
    zeros = gl.zeros([BLOCK, TILE], gl.float32, ACC)
    products = warpgroup_mma(q_smem.reshape([BLOCK, D]), k_smem.permute((1, 0)), zeros, use_acc=False)
    # every warp has read the buffer
    barrier()
    return products


@gluon.jit
def _copy_outliers(t, far_steps, kv_head, next_tile, sizes, query, key, outliers, q_smem, k_smem, ready):
    """Starts to copy the outliers of step t, or what the next tile starts with if there are no more.

    The barrier must expect it.
    """
    TILE: gl.constexpr = k_smem.shape[0]
    if t < far_steps:
        place = [kv_head, t * TILE, 0]
        tma.async_copy_global_to_shared(outliers, place, ready, k_smem.reshape(outliers.block_type.shape))
    elif next_tile < sizes[0]:
        _start(next_tile, sizes, query, key, q_smem, k_smem, ready)


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
def _weigh(products, first, position, split, best, total, qk_scale, ACC: gl.constexpr):
    """Adds keys, from position first on, to the rows' log2-sum-exp. A row sees those of its own block, up to itself.

    split says that rows lie in two key blocks.
    """
    n = gl.arange(0, products.shape[1], gl.SliceLayout(0, ACC))
    products = gl.where(n[None, :] <= (position - first)[:, None], products, float("-inf"))
    if split:
        products = gl.where(n[None, :] >= (position // BLOCK * BLOCK - first)[:, None], products, float("-inf"))
    top = gl.maximum(best, gl.max(products, 1) * qk_scale)
    shift = gl.where(top == float("-inf"), 0.0, top)
    terms = fast_exp2(gl.fma(products, qk_scale, gl.full_like(products, 0.0) - shift[:, None]))
    return top, gl.fma(total, fast_exp2(best - shift), gl.sum(terms, 1))


@gluon.jit
def _hide(products, t, position, COUNT: gl.constexpr, ACC: gl.constexpr):
    """Puts -inf where a block is not behind the row."""
    block = t * GROUP_BLOCKS + gl.arange(0, products.shape[1], gl.SliceLayout(0, ACC)) // COUNT
    return gl.where(block[None, :] < (position // BLOCK)[:, None], products, float("-inf"))


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
    "q_len", "kv_len", "rows", "width", "tiles", "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def outliers_kernel(
    query, key, outliers, words_ptr, q_len, kv_len, rows, width, tiles, HEADS, GROUP, qk_scale, log2_share, sink_blocks,
    window_blocks, last_full_blocks, COUNT: gl.constexpr, D: gl.constexpr, FOUND: gl.constexpr,
):  # fmt: skip
    """A persistent grid over (query block, head). See outliers.outliers_kernel.

    query, key and outliers are what describe gives. qk_scale is above 0.
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

    sizes = (tiles, q_len, kv_len, rows, HEADS, GROUP)
    offset = kv_len - q_len
    r = gl.arange(0, BLOCK, OF_ROWS)
    lane = gl.arange(0, STEPS, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    # the long rows first, there and back: the program with the longest one gets the shortest next
    tile = gl.program_id(0)
    ahead = 2 * (gl.num_programs(0) - tile) - 1
    step = 0
    if tile < tiles:
        mbarrier.expect(ready, query.block_type.nbytes + key.block_type.nbytes)
        _start(tile, sizes, query, key, q_smem, k_smem, ready)
    while tile < tiles:
        I, batch_head, kv_head, first_own, visible, near_steps, far_steps = _task(
            tile, tiles, q_len, kv_len, rows, HEADS, GROUP, TILE
        )
        next_tile = tile + ahead
        ahead = 2 * gl.num_programs(0) - ahead
        position = offset + I * BLOCK + r
        best = gl.full([BLOCK], float("-inf"), gl.float32, OF_ROWS)
        total = gl.zeros([BLOCK], gl.float32, OF_ROWS)
        for s in range(0, near_steps):
            at = first_own * BLOCK + s * TILE
            more = (s + 1 < near_steps) | (far_steps > 0)
            products = _multiply(step + s, more, next_tile < tiles, query, key, q_smem, k_smem, ready, ACC)
            if s + 1 < near_steps:
                _copy_keys(kv_head, HEADS // GROUP, at + TILE, key, k_smem, ready)
            else:
                _copy_outliers(0, far_steps, kv_head, next_tile, sizes, query, key, outliers, q_smem, k_smem, ready)
            best, total = _weigh(products, at, position, visible - 1 > first_own, best, total, qk_scale, ACC)
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
                more = t + 1 < far_steps
                products = _multiply(step + t, more, next_tile < tiles, query, key, q_smem, k_smem, ready, ACC)
                _copy_outliers(t + 1, far_steps, kv_head, next_tile, sizes, query, key, outliers, q_smem, k_smem, ready)
                if (t + 1) * GROUP_BLOCKS > first_own:
                    products = _hide(products, t, position, COUNT, ACC)
                largest = gl.maximum(largest, gl.max(products, 1))
                limit = _add(near, gl.fma(largest, qk_scale, gl.full_like(largest, 0.0) + log2_share))
                bits = _wanted(products, limit, qk_scale, COUNT, WORDS)
                wanted = gl.where(lane == t - w0 // 2, gl.expand_dims(bits, 2), wanted)
            _store_words(words_row, wanted, w0, visible, window_start, sink_blocks, width, FOUND, WORDS)
        step += far_steps
        tile = next_tile
