"""The guard in Triton: first the masses of sampled rows in parts of the keys, then each head's decision and words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.bits_kernel import bits_below
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.runtime.devices import multiprocessors
from flexprefill.runtime.launching import launch
from flexprefill.search.rule import Sampling
from flexprefill.variant.logits import LOG2_E

PROGRAMS = 4  # a multiprocessor
WORD_ROWS = 16  # query blocks whose words a program writes


@triton.jit(do_not_specialize="q_len kv_len rows columns width query_blocks blocks_a_part".split())
def mass_kernel(
    query_ptr, key_ptr, words_ptr, parts_ptr, query_stride_b, query_stride_h, query_stride_s, query_stride_d,
    key_stride_b, key_stride_h, key_stride_s, key_stride_d, q_len, kv_len, rows, columns, width, query_blocks,
    blocks_a_part, parts_total, kv_heads, qk_scale, D: tl.constexpr, D_PAD: tl.constexpr, D_STEP: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One tile of pairs (sampled row, query head of the group) over one part of the keys.

    Writes float32 [3, B · Hq, ROWS, parts]: the largest logit in log2, and relative to it the sum over all keys that
    the row sees and the sum over the kept ones. Neighbouring programs share their keys, so all but the first find them
    in the L2 cache.
    """
    part = tl.program_id(0) // TILES
    kv_head = tl.program_id(1)
    batch = (kv_head // kv_heads).to(tl.int64)
    kv_head = (kv_head % kv_heads).to(tl.int64)
    r = tl.arange(0, TILE)
    sample = tl.program_id(0) % TILES * (TILE // GROUP_PAD) + r // GROUP_PAD
    member = r % GROUP_PAD
    valid = (member < GROUP) & (sample < ROWS)
    row = ((2 * sample + 1).to(tl.int64) * rows // (2 * ROWS)).to(tl.int32)
    row = tl.where(valid, row, 0)
    position = tl.where(valid, row + kv_len - q_len, -1)
    head = (kv_head * GROUP + tl.where(valid, member, 0)).to(tl.int64)
    query_rows = query_ptr + batch * query_stride_b + head * query_stride_h + row.to(tl.int64) * query_stride_s
    keys_base = key_ptr + batch * key_stride_b + kv_head * key_stride_h
    index = batch * kv_heads * GROUP + head
    words_rows = words_ptr + (index * query_blocks + row // BLOCK) * width
    k = tl.arange(0, BLOCK)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    kept = tl.zeros([TILE], tl.float32)
    q = 0.0
    if D_STEP == D_PAD:
        d = tl.arange(0, D_PAD)
        q = tl.load(
            query_rows[:, None] + d[None, :] * query_stride_d, mask=valid[:, None] & (d[None, :] < D), other=0.0
        )
    first = part * blocks_a_part
    end = tl.minimum(tl.minimum(first + blocks_a_part, columns), tl.max(position, 0) // BLOCK + 1)
    for j in range(first, end):
        s = j * BLOCK + k
        pointers = keys_base + s.to(tl.int64)[None, :] * key_stride_s
        if D_STEP == D_PAD:
            d = tl.arange(0, D_PAD)
            mask = (s[None, :] < kv_len) & (d[:, None] < D)
            keys = tl.load(pointers + d[:, None] * key_stride_d, mask=mask, other=0.0)
            logits = tl.dot(q, keys, input_precision="ieee")
        else:
            logits = tl.zeros([TILE, BLOCK], tl.float32)
            for d0 in range(0, D_PAD, D_STEP):
                d = d0 + tl.arange(0, D_STEP)
                mask = valid[:, None] & (d[None, :] < D)
                part_of_q = tl.load(query_rows[:, None] + d[None, :] * query_stride_d, mask=mask, other=0.0)
                mask = (s[None, :] < kv_len) & (d[:, None] < D)
                keys = tl.load(pointers + d[:, None] * key_stride_d, mask=mask, other=0.0)
                logits = tl.dot(part_of_q, keys, logits, input_precision="ieee")
        logits = tl.where(s[None, :] <= position[:, None], logits * qk_scale, float("-inf"))
        before = best
        best = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(best == float("-inf"), 0.0, best)
        mass = tl.sum(tl.exp2(logits - shift[:, None]), 1)
        fading = tl.exp2(before - shift)
        is_kept = (tl.load(words_rows + j // 32) >> (j % 32)) & 1
        total = total * fading + mass
        kept = kept * fading + tl.where(is_kept != 0, mass, 0.0)
    heads_rows = tl.num_programs(1).to(tl.int64) * GROUP * ROWS * parts_total
    target = parts_ptr + (index * ROWS + sample) * parts_total + part
    tl.store(target, best, mask=valid)
    tl.store(target + heads_rows, total, mask=valid)
    tl.store(target + 2 * heads_rows, kept, mask=valid)


@triton.jit
def _recall_of(parts_ptr, index, heads_rows, parts_total, margin, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """A head's mean recall, its lowest, and the mean less the margin."""
    r = tl.arange(0, ROWS)
    p = tl.arange(0, PARTS)
    pointers = parts_ptr + (index * ROWS + r[:, None]) * parts_total + p[None, :]
    mask = (p[None, :] < parts_total) & (r[:, None] < ROWS)
    best = tl.load(pointers, mask=mask, other=float("-inf"))
    weight = tl.exp2(best - tl.max(best, 1)[:, None])
    total = tl.sum(tl.load(pointers + heads_rows, mask=mask, other=0.0) * weight, 1)
    kept = tl.sum(tl.load(pointers + 2 * heads_rows, mask=mask, other=0.0) * weight, 1)
    share = kept / total
    mean = tl.sum(share, 0) / ROWS
    variance = tl.sum((share - mean) * (share - mean), 0) / ROWS
    # a minimum that is NaN if a share is
    lowest = tl.where(mean == mean, tl.min(share, 0), mean)
    return mean, lowest, mean - margin * tl.sqrt(variance / ROWS)


@triton.jit(do_not_specialize="q_len kv_len query_blocks width parts_total".split())
def widen_kernel(
    parts_ptr, words_ptr, guarded_ptr, recall_ptr, lowest_ptr, widened_ptr, q_len, kv_len, query_blocks, width,
    parts_total, heads_rows, guard, margin, BLOCK: tl.constexpr, MEMBERS: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, WORD_ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A head's decision and words. Each program that writes words decides anew. MEMBERS heads decide as one."""
    index = tl.program_id(0).to(tl.int64)
    fails = 0
    for member in tl.static_range(0, MEMBERS):
        other = index // MEMBERS * MEMBERS + member
        mean, lowest, at_least = _recall_of(parts_ptr, other, heads_rows, parts_total, margin, ROWS, PARTS)
        # NaN is not enough
        fails = fails | tl.where(at_least >= guard, 0, 1)
        if (tl.program_id(1) == 0) & (other == index):
            tl.store(recall_ptr + index, mean)
            tl.store(lowest_ptr + index, lowest)
    if tl.program_id(1) == 0:
        tl.store(widened_ptr + index, fails.to(tl.int8))
    I = tl.program_id(1) * WORD_ROWS + tl.arange(0, WORD_ROWS)
    visible = (kv_len - q_len + tl.minimum((I + 1) * BLOCK, q_len) - 1) // BLOCK + 1
    for w0 in range(0, width, WORDS):
        w = w0 + tl.arange(0, WORDS)[None, :]
        inside = (I[:, None] < query_blocks) & (w < width)
        offsets = (index * query_blocks + I[:, None]) * width + w
        words = tl.load(words_ptr + offsets, mask=inside, other=0)
        words = tl.where(fails != 0, bits_below(visible[:, None], w), words)
        tl.store(guarded_ptr + offsets, words, mask=inside)


def guard_words(
    query: Tensor, key: Tensor, words: Tensor, block_size: int, scale: float, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As search.guard.guard_words."""
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16
        query, key = query.float(), key.float()
    words = words.contiguous()
    (batch, heads, q_len, head_dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    group, columns = heads // kv_heads, ceil_div(kv_len, block_size)
    query_blocks, width = words.shape[2:]
    head_pad, group_pad = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    tile = max(64, group_pad)
    samples = sampling.samples
    tiles = ceil_div(samples, tile // group_pad)
    parts = max(1, min(columns, ceil_div(PROGRAMS * multiprocessors(query.device), batch * kv_heads * tiles)))
    blocks_a_part = ceil_div(columns, parts)
    parts = ceil_div(columns, blocks_a_part)
    sums = torch.empty(3, batch * heads, samples, parts, dtype=torch.float32, device=query.device)
    launch(
        mass_kernel, (tiles * parts, batch * kv_heads), query, key, words, sums, *query.stride(), *key.stride(), q_len,
        kv_len, sampling.rows, columns, width, query_blocks, blocks_a_part, parts, kv_heads, scale * LOG2_E, D=head_dim,
        D_PAD=head_pad, D_STEP=head_pad if head_pad * query.element_size() <= 256 else 64,
        BLOCK=block_size, GROUP=group, GROUP_PAD=group_pad, ROWS=samples, TILE=tile, TILES=tiles, num_warps=4,
        num_stages=3,
    )  # fmt: skip
    guarded = torch.empty_like(words)
    recall = torch.empty(batch, heads, dtype=torch.float32, device=query.device)
    lowest, widened = torch.empty_like(recall), torch.empty_like(recall, dtype=torch.bool)
    launch(
        widen_kernel, (batch * heads, ceil_div(query_blocks, WORD_ROWS)), sums, words, guarded, recall, lowest,
        widened.view(torch.int8), q_len, kv_len, query_blocks, width, parts, sums.stride(0), sampling.guard,
        sampling.margin, BLOCK=block_size, MEMBERS=group if sampling.kv_masks else 1, ROWS=samples,
        PARTS=triton.next_power_of_2(parts), WORD_ROWS=WORD_ROWS, WORDS=min(32, triton.next_power_of_2(width)),
        num_warps=4,
    )  # fmt: skip
    return guarded, recall, lowest, widened
