"""Means of key blocks in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

NOT_SPECIALIZED = ["kv_len", "columns"]  # without this, each kind of length would be compiled for


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pool_kernel(
    key_ptr, means_ptr, stride_b, stride_h, stride_s, stride_d, kv_len, columns, HEADS, ends_ptr, sequence_stride,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One key block's mean in float32: key [B, H, S, D] to means [B, H, N, D], contiguous.

    With SEQUENCES it is the mean of the keys in the sequence of the block's first key, to the first N of N + N + S.
    """
    J = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = J * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    end = kv_len
    rows = columns
    if SEQUENCES:
        end = tl.load(ends_ptr + (head // HEADS) * sequence_stride + J * BLOCK)
        rows = 2 * columns + kv_len
    base = key_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
    offsets = s.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    keys = tl.load(base + offsets, mask=(s[:, None] < end) & (d[None, :] < D), other=0.0).to(tl.float32)
    # no keys where padding comes first
    count = tl.maximum(tl.minimum(end - J * BLOCK, BLOCK), 1)
    mean = tl.sum(keys, 0) / count.to(tl.float32)
    tl.store(means_ptr + (head * rows + J) * D + d, mean.to(means_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pool_pages_kernel(
    key_ptr, means_ptr, stride_p, stride_h, stride_s, stride_d, table_ptr, table_stride, wanted_ptr, kv_len, columns,
    HEADS, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """One key block's mean in float32, of keys in pages [P, H, PAGE, D], to means [B, H, N, D], contiguous.

    With WANTED it writes only the blocks that are set in bytes [B, N], and reads no keys of others.
    """
    J = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    entry = head // HEADS
    wanted = True
    if WANTED:
        wanted = tl.load(wanted_ptr + entry * columns + J) != 0
    s = J * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    inside = (s < kv_len) & wanted
    row_table = table_ptr + entry * table_stride
    if PAGE % BLOCK == 0:  # one page, so rows are a stride apart
        page = tl.load(row_table + J * BLOCK // PAGE).to(tl.int64)
    else:
        page = tl.load(row_table + s // PAGE, mask=inside, other=0).to(tl.int64)
    rows = key_ptr + (head % HEADS) * stride_h + page * stride_p + (s % PAGE).to(tl.int64) * stride_s
    keys = tl.load(rows[:, None] + d[None, :] * stride_d, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    # as pool_kernel, so that both give the same bits
    count = tl.minimum(kv_len - J * BLOCK, BLOCK)
    mean = tl.sum(keys.to(tl.float32), 0) / count.to(tl.float32)
    tl.store(means_ptr + (head * columns + J) * D + d, mean.to(means_ptr.dtype.element_ty), mask=(d < D) & wanted)


@triton.jit
def _mean_of(keys, members, inside):
    """The mean of the keys at pointers [BLOCK, D] that are members [BLOCK]. Zeros if none is."""
    # read again for each mean, because a block of float32 takes more registers than there are
    own = tl.load(keys, mask=members[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.sum(own, 0) / tl.maximum(tl.sum(members.to(tl.int32), 0), 1).to(tl.float32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pool_sequences_kernel(
    key_ptr, means_ptr, stride_b, stride_h, stride_s, stride_d, kv_len, columns, HEADS, starts_ptr, ends_ptr,
    sequence_stride, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means of the sequences that start inside one key block, as reference.pool_own_keys describes them.

    It writes the mean of the block's last sequence if that starts inside. It writes means at the positions of sequences
    that also end inside. No others are read, besides those of pool_kernel.
    """
    J = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = J * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    starts = starts_ptr + (head // HEADS) * sequence_stride
    ends = ends_ptr + (head // HEADS) * sequence_stride
    end = tl.minimum((J + 1) * BLOCK, kv_len)
    sequence_start = tl.load(starts + s, mask=s < kv_len, other=kv_len)
    sequence_end = tl.load(ends + s, mask=s < kv_len, other=0)
    member = sequence_start < sequence_end
    if tl.max((member & (sequence_start > J * BLOCK)).to(tl.int32), 0) > 0:
        base = key_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
        offsets = s.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
        keys = base + offsets
        means = means_ptr + head * (2 * columns + kv_len) * D + d
        of_last = _mean_of(keys, member & (s >= tl.load(starts + end - 1)), d < D)
        tl.store(means + (columns + J) * D, of_last.to(means_ptr.dtype.element_ty), mask=d < D)
        place = tl.maximum(J * BLOCK + 1, tl.load(ends + J * BLOCK))
        while place < end:
            own_start = tl.load(starts + place)
            own_end = tl.load(ends + place)
            if (own_start < own_end) & (own_end < end):
                members = (s >= own_start) & (s < own_end)
                mean = _mean_of(keys, members, d < D)
                rows = means[None, :] + (2 * columns + s).to(tl.int64)[:, None] * D
                values = tl.broadcast_to(mean[None, :], [BLOCK, D_PAD]).to(means_ptr.dtype.element_ty)
                tl.store(rows, values, mask=members[:, None] & (d[None, :] < D))
            place = tl.maximum(place + 1, own_end)
