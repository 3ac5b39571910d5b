"""The probes' side of the two-sided search in Triton: a few rows of each query block against all keys."""

from __future__ import annotations

import triton
import triton.language as tl

from flexprefill.search import two_sided
from flexprefill.search.kernels.outliers import always_bits, load_rows, products

NEIGHBOUR_SHARE = tl.constexpr(two_sided.NEIGHBOUR_SHARE)

NOT_SPECIALIZED = [
    "q_len", "kv_len", "rows", "width", "first", "end", "tiles", "sink_blocks", "window_blocks", "last_full_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def probes_kernel(
    query_ptr, key_ptr, far_ptr, words_ptr, held_ptr, scratch_ptr, query_b, query_h, query_s, query_d, key_b, key_h,
    key_s, key_d, scratch_stride, q_len, kv_len, rows, width, first, end, tiles, HEADS, qk_scale, probe_share,
    sink_blocks, window_blocks, last_full_blocks, FAR: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    NUMBER: tl.constexpr, PROBES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
    D_STEP: tl.constexpr, FOUND: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A persistent grid over (NUMBER query blocks of first … end, MEMBERS query heads of a key head).

    See two_sided.blocks_of_probes. All query blocks from first to end have PROBES probes. A program keeps the log2 mass
    of each key block and row in scratch of its own, [N, rows of the tile], and reads it when the rows' sums are known.
    Writes words int32 [B, HEADS, rows, width]. With FOUND they hold blocks already, which stay. With HELD it writes how
    much of the even probes' attention the kept blocks hold, float32 [B, HEADS, rows].
    """
    ROWS: tl.constexpr = MEMBERS * NUMBER * PROBES
    SETS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    EVEN: tl.constexpr = (PROBES + 1) // 2
    program = tl.program_id(0)
    scratch = scratch_ptr + program.to(tl.int64) * scratch_stride
    offset = kv_len - q_len
    r = tl.arange(0, ROWS)
    member_in_set = r // (NUMBER * PROBES)
    i = r % PROBES
    c = tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    n = tl.arange(0, NUMBER)
    m = tl.arange(0, MEMBERS)
    groups = (end - first + NUMBER - 1) // NUMBER
    sets_total = tiles // groups
    for tile in range(program, tiles, tl.num_programs(0)):
        I0 = first + (groups - 1 - tile // sets_total) * NUMBER
        of_set = (tile % sets_total).to(tl.int64)
        kv_head = of_set // SETS
        member = (of_set % SETS).to(tl.int32) * MEMBERS + member_in_set
        batch = kv_head * GROUP // HEADS
        head = kv_head * GROUP % HEADS + tl.minimum(member, GROUP - 1)
        I = tl.minimum(I0 + r // PROBES % NUMBER, end - 1)
        size = tl.minimum(q_len - I * BLOCK, BLOCK)
        row = (2 * (i * GROUP + tl.minimum(member, GROUP - 1)) + 1) * size // (2 * GROUP * EVEN)
        if PROBES > 1:
            far = tl.load(far_ptr + ((batch * HEADS + head) * rows + I) * FAR + tl.maximum(i - EVEN, 0))
            row = tl.where(i < EVEN, row, far)
        row = I * BLOCK + row
        position = offset + row
        query_rows = query_ptr + batch * query_b + head * query_h + row.to(tl.int64) * query_s
        q = load_rows(query_rows, query_d, D, D_PAD, D_STEP)
        keys = key_ptr + batch * key_b + (kv_head % (HEADS // GROUP)) * key_h
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        seen = tl.max(position, 0) // BLOCK + 1
        whole = tl.minimum((tl.min(position, 0) + 1) // BLOCK, seen)
        of_keys = keys + c.to(tl.int64) * key_s
        for J in tl.range(0, whole, num_stages=STAGES):
            x = products(q, query_rows, query_d, of_keys, key_d, c >= 0, D, D_PAD, D_STEP)
            of_keys += BLOCK * key_s
            top = tl.maximum(best, tl.max(x, 1) * qk_scale)
            mass = tl.sum(tl.exp2(x * qk_scale - top[:, None]), 1)
            total = total * tl.exp2(best - top) + mass
            best = top
            tl.store(scratch + J * ROWS + r, top + tl.log2(mass))
        for J in tl.range(whole, seen, num_stages=1):
            at = J * BLOCK + c
            x = products(q, query_rows, query_d, of_keys, key_d, at < kv_len, D, D_PAD, D_STEP) * qk_scale
            of_keys += BLOCK * key_s
            x = tl.where(at[None, :] <= position[:, None], x, float("-inf"))
            top = tl.maximum(best, tl.max(x, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            mass = tl.sum(tl.exp2(x - shift[:, None]), 1)
            total = total * tl.exp2(best - shift) + mass
            best = top
            tl.store(scratch + J * ROWS + r, shift + tl.log2(mass))
        tl.debug_barrier()  # other threads wrote what is read now
        sums = best + tl.log2(total)
        last = offset + tl.minimum((I0 + n + 1) * BLOCK, q_len) - 1
        visible = last // BLOCK + 1
        of_member = (of_set % SETS).to(tl.int32) * MEMBERS + m
        valid = (of_member[:, None] < GROUP) & (I0 + n[None, :] < end)
        index = (kv_head * GROUP + of_member)[:, None] * rows + I0 + n[None, :]
        held = tl.zeros([MEMBERS, NUMBER], tl.float32)
        for w in tl.range(0, width, num_stages=1):
            column = w * 32 + lane
            of_scratch = scratch + column[:, None] * ROWS + r[None, :]
            L = tl.load(of_scratch, mask=column[:, None] < seen, other=float("-inf"))
            share = tl.exp2(L - sums[None, :])
            shares = tl.reshape(share, [32, MEMBERS, NUMBER, PROBES])
            mean = tl.sum(shares, 3) / PROBES
            of_others = tl.where(of_member[None, :, None] < GROUP, mean, 0.0)
            strong = tl.max(of_others, 1)[:, None, :] * NEIGHBOUR_SHARE >= probe_share
            column3 = column[:, None, None]
            kept = (((mean < probe_share) == 0) | strong) & (column3 < visible[None, None, :])
            kept = kept | always_bits(
                column3,
                (I0 + n)[None, None, :],
                visible[None, None, :],
                rows,
                sink_blocks,
                window_blocks,
                last_full_blocks,
            )
            bits = tl.sum(kept.to(tl.int32) << lane[:, None, None], 0)
            if FOUND:
                bits = bits | tl.load(words_ptr + index * width + w, mask=valid, other=0)
            tl.store(words_ptr + index * width + w, bits, mask=valid)
            if HELD:
                all_kept = ((bits[None, :, :] >> lane[:, None, None]) & 1) != 0
                even = tl.reshape(tl.where((i < EVEN)[None, :], share, 0.0), [32, MEMBERS, NUMBER, PROBES])
                held += tl.sum(tl.where(all_kept, tl.sum(even, 3), 0.0), 0) / EVEN
        if HELD:
            tl.store(held_ptr + index, held, mask=valid)
        tl.debug_barrier()  # the next tile overwrites the scratch
