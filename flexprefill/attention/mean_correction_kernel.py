"""Attention over the means of dropped blocks in Triton, merged with attention over the kept blocks."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.variant.logits import LOG2_E

LN_2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize="q_len kv_len tiles columns width".split())
def merge_means_kernel(
    query_ptr, key_means_ptr, value_means_ptr, words_ptr, output_ptr, lse_ptr, merged_ptr, sums_ptr, query_stride_b,
    query_stride_h, query_stride_s, query_stride_d, output_stride_b, output_stride_h, output_stride_s,
    output_stride_d, q_len, kv_len, tiles, columns, width, HEADS, GROUP, qk_scale, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one query block and head: an online softmax over the means of its dropped blocks.

    merged has output's strides. lse and sums are contiguous.
    """
    # the longest rows start first
    first_row = (tiles - 1 - tl.program_id(0)) * ROWS
    batch_head = tl.program_id(1).to(tl.int64)
    I = first_row // BLOCK
    row = first_row + tl.arange(0, ROWS)
    inside = row < q_len
    seen = kv_len - q_len + I * BLOCK + 1  # positions that every row of the query block sees
    whole = tl.where(seen == kv_len, columns, seen // BLOCK)
    words_row = words_ptr + (batch_head * ((q_len + BLOCK - 1) // BLOCK) + I) * width

    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    query_base = query_ptr + (batch_head // HEADS) * query_stride_b + (batch_head % HEADS) * query_stride_h
    q_offsets = row.to(tl.int64)[:, None] * query_stride_s + d[None, :] * query_stride_d
    queries = tl.load(query_base + q_offsets, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    key_base = key_means_ptr + (batch_head // GROUP) * columns * D
    value_base = value_means_ptr + (batch_head // GROUP) * columns * DV

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DV_PAD], tl.float32)
    for j0 in range(0, whole, TILE):
        j = j0 + tl.arange(0, TILE)
        word = tl.load(words_row + j // 32, mask=j < whole, other=-1)
        dropped = ((word >> (j % 32)) & 1) == 0
        keys = tl.load(key_base + j[None, :] * D + d[:, None], mask=(j[None, :] < whole) & (d[:, None] < D), other=0.0)
        values = tl.load(
            value_base + j[:, None] * DV + dv[None, :], mask=(j[:, None] < whole) & (dv[None, :] < DV), other=0.0
        )
        log_sizes = tl.log2(tl.minimum(tl.maximum(kv_len - j * BLOCK, 1), BLOCK).to(tl.float32))
        logits = tl.dot(queries, keys, input_precision="ieee") * qk_scale + log_sizes[None, :]
        logits = tl.where(dropped[None, :], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(logits - shift[:, None])
        fading = tl.exp2(best - shift)
        total = total * fading + tl.sum(shares, 1)
        mean = tl.dot(shares.to(values.dtype), values, mean * fading[:, None], input_precision="ieee")
        best = higher

    kept = tl.load(lse_ptr + batch_head * q_len + row, mask=inside, other=0.0) / LN_2
    higher = tl.maximum(best, kept)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    of_kept = tl.exp2(kept - shift)
    of_means = tl.exp2(best - shift)
    total = total * of_means + of_kept
    output_base = (batch_head // HEADS) * output_stride_b + (batch_head % HEADS) * output_stride_h
    offsets = output_base + row.to(tl.int64)[:, None] * output_stride_s + dv[None, :] * output_stride_d
    mask = inside[:, None] & (dv[None, :] < DV)
    output = tl.load(output_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # the output of a row that keeps nothing may hold anything
    output = tl.where(of_kept[:, None] > 0, output * of_kept[:, None], 0.0)
    merged = (output + mean * of_means[:, None]) / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(merged_ptr + offsets, merged.to(merged_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + batch_head * q_len + row, (shift + tl.log2(total)) * LN_2, mask=inside)


def _launch(query: Tensor, value_dim: int) -> tuple[int, int, int, int]:
    """Rows a program at most, means a step, warps and stages."""
    wide = max(query.shape[3], value_dim) > 128
    if query.dtype == torch.float32 and query.is_cuda:
        # exact products need many registers, and no tensor core computes them
        return 32 if wide else 64, 32, 8, 1
    return (64, 64, 4, 2) if wide else (128, 64, 8, 3)


def merge(
    query: Tensor,
    key_means: Tensor,
    value_means: Tensor,
    geometry: Geometry,
    scale: float,
    words: Tensor,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """As merge_means by "reference", in mean_correction.py, from the means of key and value blocks."""
    batch, heads, q_len, head_dim = query.shape
    value_dim, dtype = value_means.shape[3], output.dtype
    if not query.is_cuda:
        # Triton's interpreter has a wrong dot for bfloat16; products of bfloat16 are exact in float32
        query, key_means, value_means, output = (x.float() for x in (query, key_means, value_means, output))
    most_rows, tile, warps, stages = _launch(query, value_dim)
    rows = min(most_rows, geometry.block_size)
    tiles = ceil_div(q_len, rows)
    merged = torch.empty_like(output)
    lse = lse.contiguous()
    sums = torch.empty_like(lse)
    merge_means_kernel[(tiles, batch * heads)](
        *(query, key_means, value_means, words.contiguous(), output, lse, merged, sums), *query.stride(),
        *output.stride(),
        *(q_len, geometry.kv_len, tiles, key_means.shape[2], words.shape[3], heads, heads // key_means.shape[1]),
        scale * LOG2_E, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), DV=value_dim,
        DV_PAD=triton.next_power_of_2(value_dim), BLOCK=geometry.block_size, ROWS=rows, TILE=tile,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return merged.to(dtype), sums
