"""The probes' side of the two-sided search in Triton: a few rows of each query block against all keys.

Two kernels share the work. The first takes a tile of probed rows and a span of key blocks, and writes what the blocks
hold to scratch. The second reads that and writes the words. So a long row is the work of many programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.search import two_sided
from flexprefill.search.kernels.outliers import always_bits, load_rows, products

TILE_ROWS = 128  # probed rows of a tile
SEGMENT = 8  # neighbouring key blocks with a sum of their own
DECIDED = 1024  # masses that a step of the decision reads, at least

FULL_SIGHT = tl.constexpr(two_sided.FULL_SIGHT)
SIGHT_STEP = tl.constexpr(two_sided.SIGHT_STEP)
NEIGHBOUR_SHARE = tl.constexpr(two_sided.NEIGHBOUR_SHARE)
ROWS = tl.constexpr(TILE_ROWS)
SEGMENT_BLOCKS = tl.constexpr(SEGMENT)
STEP = tl.constexpr(DECIDED)


@triton.jit
def _first_behind(keys, q_len, kv_len, BLOCK: tl.constexpr):
    """The first query block whose last row stands behind the first ``keys`` keys, or one behind the last."""
    block = (q_len + BLOCK - 1) // BLOCK
    if kv_len > keys:
        block = max(keys - (kv_len - q_len), 0) // BLOCK
    return block


@triton.jit
def _visible(end, q_len, kv_len, BLOCK: tl.constexpr):
    """How many key blocks the query blocks before ``end`` can see."""
    return (kv_len - q_len + min(end * BLOCK, q_len) + BLOCK - 1) // BLOCK


@triton.jit
def _stretch(
    k: tl.constexpr, first, end, q_len, kv_len, MEMBERS: tl.constexpr, PROBES: tl.constexpr, BLOCK: tl.constexpr
):
    """The query blocks from first to end that have PROBES >> k probes each. See two_sided.probes_of.

    Returns the first one, how many they are, their tiles of a set of heads, how many key blocks they can see, and the
    lines of scratch that a tile has.
    """
    KEYS: tl.constexpr = FULL_SIGHT * SIGHT_STEP**k * BLOCK
    start = first
    stop = end
    if k > 0:
        start = max(start, _first_behind(KEYS // SIGHT_STEP, q_len, kv_len, BLOCK))
    if PROBES >> k > 1:
        stop = min(stop, _first_behind(KEYS, q_len, kv_len, BLOCK))
    count = max(stop - start, 0)
    tiles = (count * (MEMBERS * (PROBES >> k)) + ROWS - 1) // ROWS
    columns = _visible(stop, q_len, kv_len, BLOCK)
    return start, count, tiles, columns, columns + (columns + SEGMENT_BLOCKS - 1) // SEGMENT_BLOCKS


@triton.jit
def tile_of(
    program, first, end, sets, span_log2, q_len, kv_len, MEMBERS: tl.constexpr, PROBES_LOG2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a program of masses_kernel works on.

    Programs are ordered by stretch, then key blocks, then set, then tile. Those that run together read the same keys,
    and the spans that few tiles reach come last.

    Returns:
        The set. The tile's first row in its stretch. The stretch's first query block, how many it has, and log2 of
        their probes. The tile's first line in scratch, and its line of the first segment's sums. The span's first key
        block, one behind its last, and the first key block that some row of the tile may not see whole.
    """
    begun = 0
    lines_before = 0
    own_set = 0
    row = 0
    start = 0
    count = 0
    probes_log2 = 0
    line = 0
    columns = 0
    J = 0
    for k in tl.static_range(PROBES_LOG2, -1, -1):
        k_start, k_count, k_tiles, k_columns, k_lines = _stretch(
            k, first, end, q_len, kv_len, MEMBERS, 1 << PROBES_LOG2, BLOCK
        )
        spans = (k_columns + (SEGMENT_BLOCKS << span_log2) - 1) // SEGMENT_BLOCKS >> span_log2
        place = program - begun
        if (place >= 0) & (place < spans * sets * k_tiles):
            of_span = place % (sets * k_tiles)
            own_set = of_span // k_tiles
            row = of_span % k_tiles * ROWS
            start = k_start
            count = k_count
            probes_log2 = PROBES_LOG2 - k
            line = lines_before + of_span * k_lines
            columns = k_columns
            J = place // (sets * k_tiles) * (SEGMENT_BLOCKS << span_log2)
        begun += spans * sets * k_tiles
        lines_before += sets * k_tiles * k_lines
    I = start + ((row >> probes_log2) // MEMBERS)
    last = start + min(((row + ROWS - 1) >> probes_log2) // MEMBERS, count - 1)
    stop = min(J + (SEGMENT_BLOCKS << span_log2), _visible(last + 1, q_len, kv_len, BLOCK))
    whole = (kv_len - q_len + I * BLOCK + 1) // BLOCK
    return own_set, row, start, count, probes_log2, line, line + columns, J, stop, whole


@triton.jit
def probed_rows(
    r, own_set, start, count, probes_log2, far_ptr, q_len, FAR: tl.constexpr, GROUP: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The query heads, counted through the batch, and the rows in the sequence of a stretch's rows r.

    Rows are ordered by query block, then head, then probe. What is behind the last query block or head repeats it.
    """
    SETS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    even = ((1 << probes_log2) + 1) >> 1
    i = r & ((1 << probes_log2) - 1)
    member = tl.minimum(own_set % SETS * MEMBERS + (r >> probes_log2) % MEMBERS, GROUP - 1)
    I = start + tl.minimum((r >> probes_log2) // MEMBERS, count - 1)
    size = tl.minimum(q_len - I * BLOCK, BLOCK)
    head = own_set // SETS * GROUP + member
    row = ((2 * (i * GROUP + member) + 1) * size // (2 * GROUP)) >> max(probes_log2 - 1, 0)
    blocks = (q_len + BLOCK - 1) // BLOCK
    of_far = (head.to(tl.int64) * blocks + I) * FAR + tl.maximum(i - even, 0)
    far = tl.load(far_ptr + of_far, mask=i >= even, other=0)
    return head, I * BLOCK + tl.where(i < even, row, far)


@triton.jit
def _weigh(x, step, best, total, qk_scale):
    """Adds a program's step-th key block to the rows' largest log2 weight and to their sum, relative to 2^best.

    A segment begins anew. Returns both and the log2 of the block's own sum. Hidden products are -inf.
    """
    best = tl.where(step % SEGMENT_BLOCKS == 0, float("-inf"), best)
    total = tl.where(step % SEGMENT_BLOCKS == 0, 0.0, total)
    top = tl.maximum(best, tl.max(x, 1) * qk_scale)
    shift = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.exp2(tl.fma(x, qk_scale, -shift[:, None])), 1)
    return top, tl.fma(total, tl.exp2(best - shift), mass), shift + tl.log2(mass)


@triton.jit
def _store_masses(masses, sums, J, J0, stop, best, total, mass):
    """Stores a key block's masses, and behind the last one of a segment or a span its sums."""
    done = ((J - J0) % SEGMENT_BLOCKS == SEGMENT_BLOCKS - 1) | (J + 1 == stop)
    tl.store(masses + J * ROWS, mass)
    tl.store(sums + J // SEGMENT_BLOCKS * ROWS, best + tl.log2(total), mask=done & (tl.arange(0, ROWS) >= 0))


# without this, each value of these parameters would be compiled for
NOT_SPECIALIZED = ["q_len", "kv_len", "first", "end", "first_set", "sets", "span_log2"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def masses_kernel(
    query_ptr, key_ptr, far_ptr, scratch_ptr, query_b, query_h, query_s, query_d, key_b, key_h, key_s, key_d, q_len,
    kv_len, first, end, first_set, sets, span_log2, HEADS, qk_scale, FAR: tl.constexpr, GROUP: tl.constexpr,
    MEMBERS: tl.constexpr, PROBES_LOG2: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    D_STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A grid over (span of key blocks, tile of probed rows) of the query blocks from first to end. See tile_of.

    Writes the log2 mass of each key block and row, and the sum of each segment of key blocks and row. A segment begins
    with no sum from the ones before it, so the bits do not depend on how programs share the segments. A line of scratch
    has a number for each row of a tile. A tile has a line for each key block, then one for each segment.
    """
    own_set, first_row, start, count, probes_log2, line, sums_line, J0, stop, whole = tile_of(
        tl.program_id(0), first, end, sets, span_log2, q_len, kv_len, MEMBERS, PROBES_LOG2, BLOCK
    )
    if J0 >= stop:
        return
    SETS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    own_set += first_set
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    head, row = probed_rows(
        first_row + r, own_set, start, count, probes_log2, far_ptr, q_len, FAR, GROUP, MEMBERS, BLOCK
    )
    position = kv_len - q_len + row
    kv_head = own_set // SETS
    batch = (kv_head * GROUP // HEADS).to(tl.int64)
    query_rows = query_ptr + batch * query_b + (head - batch * HEADS) * query_h + row.to(tl.int64) * query_s
    q = load_rows(query_rows, query_d, D, D_PAD, D_STEP)
    keys = key_ptr + batch * key_b + (kv_head % (HEADS // GROUP)).to(tl.int64) * key_h
    of_keys = keys + (J0 * BLOCK + c).to(tl.int64) * key_s
    masses = scratch_ptr + tl.cast(line, tl.int64) * ROWS + r
    sums = scratch_ptr + tl.cast(sums_line, tl.int64) * ROWS + r
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for J in tl.range(J0, min(whole, stop), num_stages=STAGES):
        x = products(q, query_rows, query_d, of_keys, key_d, c >= 0, D, D_PAD, D_STEP)
        of_keys += BLOCK * key_s
        best, total, mass = _weigh(x, J - J0, best, total, qk_scale)
        _store_masses(masses, sums, J, J0, stop, best, total, mass)
    for J in tl.range(max(J0, whole), stop, num_stages=1):
        at = J * BLOCK + c
        x = products(q, query_rows, query_d, of_keys, key_d, at < kv_len, D, D_PAD, D_STEP)
        of_keys += BLOCK * key_s
        x = tl.where(at[None, :] <= position[:, None], x, float("-inf"))
        best, total, mass = _weigh(x, J - J0, best, total, qk_scale)
        _store_masses(masses, sums, J, J0, stop, best, total, mass)


@triton.jit
def _row_sums(lines, segments, CHUNK: tl.constexpr):
    """log2 of the rows' whole sums, from those of their segments. lines point to the rows' first ones.

    All chunks are of one shape, and what is behind the last segment adds nothing, so the order of additions is fixed.
    """
    best = tl.full([lines.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([lines.shape[0]], tl.float32)
    for first in tl.range(0, segments, CHUNK, num_stages=1):
        segment = first + tl.arange(0, CHUNK)
        of_segments = lines[None, :] + segment[:, None] * ROWS
        L = tl.load(of_segments, mask=segment[:, None] < segments, other=float("-inf"))
        top = tl.maximum(best, tl.max(L, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.fma(total, tl.exp2(best - shift), tl.sum(tl.exp2(L - shift[None, :]), 0))
        best = top
    return best + tl.log2(total)


@triton.jit
def _decide(
    lines, columns, words_ptr, held_ptr, I, own_set, visible, rows, width, probe_share, sink_blocks, window_blocks,
    last_full_blocks, GROUP: tl.constexpr, MEMBERS: tl.constexpr, PROBES: tl.constexpr, FOUND: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Writes the words of a query block and a set of heads. lines point to its rows in scratch."""
    SETS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    EVEN: tl.constexpr = (PROBES + 1) // 2
    WORDS: tl.constexpr = max(STEP // (32 * MEMBERS * PROBES), 1)  # a step
    CHUNK: tl.constexpr = max(STEP // (MEMBERS * PROBES), SEGMENT_BLOCKS)
    segments = (visible + SEGMENT_BLOCKS - 1) // SEGMENT_BLOCKS
    sums = _row_sums(lines + columns * ROWS, segments, CHUNK)
    member = own_set % SETS * MEMBERS + tl.arange(0, MEMBERS)
    index = (own_set // SETS * GROUP + member).to(tl.int64) * rows + I
    w = tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    even = (tl.arange(0, MEMBERS * PROBES) % PROBES < EVEN)[None, :]
    at_words = words_ptr + index[None, :] * width + w[:, None]
    held = tl.zeros([WORDS, MEMBERS], tl.float32)
    for w0 in tl.range(0, (visible + 31) // 32, WORDS, num_stages=1):
        column = w0 * 32 + tl.arange(0, WORDS * 32)
        of_columns = lines[None, :] + column[:, None] * ROWS
        L = tl.load(of_columns, mask=column[:, None] < visible, other=float("-inf"))
        share = tl.exp2(L - sums[None, :])
        mean = tl.sum(tl.reshape(share, [WORDS, 32, MEMBERS, PROBES]), 3) / PROBES
        of_others = tl.where(member[None, None, :] < GROUP, mean, 0.0)
        strong = tl.max(of_others, 2)[:, :, None] * NEIGHBOUR_SHARE >= probe_share
        J = ((w0 + w)[:, None] * 32 + lane[None, :])[:, :, None]
        # a NaN is not below the share
        kept = (((mean < probe_share) == 0) | strong) & (J < visible)
        kept = kept | always_bits(J, I, visible, rows, sink_blocks, window_blocks, last_full_blocks)
        bits = tl.sum(kept.to(tl.int32) << lane[None, :, None], 1)
        inside = (member[None, :] < GROUP) & (w0 + w[:, None] < width)
        if FOUND:
            bits = bits | tl.load(at_words + w0, mask=inside, other=0)
        tl.store(at_words + w0, bits, mask=inside)
        if HELD:
            all_kept = ((bits[:, None, :] >> lane[None, :, None]) & 1) != 0
            of_even = tl.reshape(tl.where(even, share, 0.0), [WORDS, 32, MEMBERS, PROBES])
            held += tl.sum(tl.where(all_kept, tl.sum(of_even, 3), 0.0), 1) / EVEN
    if FOUND == 0:
        # words of blocks that the query block cannot see
        for w0 in tl.range((visible + 31) // 32, width, WORDS, num_stages=1):
            tl.store(at_words + w0, 0, mask=(member[None, :] < GROUP) & (w0 + w[:, None] < width))
    if HELD:
        tl.store(held_ptr + index, tl.sum(held, 0), mask=member < GROUP)


DECIDE_NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "width", "first", "end", "first_set", "sets", "sink_blocks", "window_blocks",
    "last_full_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=DECIDE_NOT_SPECIALIZED)
def decide_kernel(
    scratch_ptr, words_ptr, held_ptr, q_len, kv_len, rows, width, first, end, first_set, sets, probe_share,
    sink_blocks, window_blocks, last_full_blocks, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    PROBES_LOG2: tl.constexpr, BLOCK: tl.constexpr, FOUND: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """A grid over (query block from first to end, set of MEMBERS query heads of a key head), the long rows first.

    See two_sided.blocks_of_probes. Reads what masses_kernel wrote. Writes words int32 [B, HEADS, rows, width]. With
    FOUND they hold blocks already, which stay. With HELD it writes how much of the even probes' attention the kept
    blocks hold, float32 [B, HEADS, rows].
    """
    program = tl.program_id(0)
    I = end - 1 - program // sets
    own_set = program % sets
    lines_before = 0
    for k in tl.static_range(PROBES_LOG2, -1, -1):
        start, count, tiles, columns, lines = _stretch(k, first, end, q_len, kv_len, MEMBERS, 1 << PROBES_LOG2, BLOCK)
        if (I >= start) & (I < start + count):
            of_set = scratch_ptr + (lines_before + own_set * tiles * lines).to(tl.int64) * ROWS
            row = (I - start) * (MEMBERS << PROBES_LOG2 >> k) + tl.arange(0, MEMBERS << PROBES_LOG2 >> k)
            _decide(
                of_set + row // ROWS * lines * ROWS + row % ROWS, columns, words_ptr, held_ptr, I, first_set + own_set,
                _visible(I + 1, q_len, kv_len, BLOCK), rows, width, probe_share, sink_blocks, window_blocks,
                last_full_blocks, GROUP, MEMBERS, 1 << PROBES_LOG2 >> k, FOUND, HELD,
            )  # fmt: skip
        lines_before += sets * tiles * lines
