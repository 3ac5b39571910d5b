"""Attention over the means of dropped blocks in Triton, merged with attention over the kept blocks."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.runtime.launching import launch
from flexprefill.search.kernels.launch import hopper_copies
from flexprefill.variant.logits import LOG2_E

LN_2 = tl.constexpr(math.log(2))
# not 0: times a hidden product's -inf it would be NaN; and the log2 of a block's size over it must be finite
SMALLEST_SCALE = 2.0**-120


@triton.jit
def _load_means(base, j, whole, D: tl.constexpr, D_PAD: tl.constexpr, LAST: tl.constexpr):
    """Means j as rows: [TILE, D_PAD]. Of the LAST tile those from ``whole`` on come as zeros."""
    d = tl.arange(0, D_PAD)
    pointers = base + j[:, None] * D + d[None, :]
    if LAST:
        means = tl.load(pointers, mask=(j[:, None] < whole) & (d[None, :] < D), other=0.0)
    elif D < D_PAD:
        means = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    else:
        means = tl.load(pointers)
    return means


@triton.jit
def _add_tile(
    j0, low, high, best, total, mean, queries, key_base, value_base, kv_len, whole, qk_scale, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LOG2: tl.constexpr,
    TILE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Adds the dropped blocks from j0 on to the online softmax, as if each had BLOCK keys. low and high are their bits.

    The LAST tile may end behind ``whole`` and hold the prompt's short last block.
    """
    bit = tl.arange(0, TILE)
    j = j0 + bit
    keys = _load_means(key_base, j, whole, D, D_PAD, LAST)
    values = _load_means(value_base, j, whole, DV, DV_PAD, LAST)
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    dropped = ((tl.where(bit < 32, low, high) >> (bit % 32)) & 1) == 0
    if LAST:
        dropped = dropped & (j < whole)
        sizes = tl.minimum(tl.maximum(kv_len - j * BLOCK, 1), BLOCK).to(tl.float32)
        products += ((tl.log2(sizes) - BLOCK_LOG2) / qk_scale)[None, :]
    products = tl.where(dropped[None, :], products, float("-inf"))
    higher = tl.maximum(best, tl.max(products, 1) * qk_scale)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    shares = tl.exp2(products * qk_scale - shift[:, None])
    fading = tl.exp2(best - shift)
    total = total * fading + tl.sum(shares, 1)
    mean = tl.dot(shares.to(values.dtype), values, mean * fading[:, None], input_precision="ieee")
    return higher, total, mean


@triton.jit(do_not_specialize="q_len kv_len tiles columns width".split())
def merge_means_kernel(
    query_ptr, key_means_ptr, value_means_ptr, words_ptr, output_ptr, lse_ptr, merged_ptr, sums_ptr, query_stride_b,
    query_stride_h, query_stride_s, query_stride_d, output_stride_b, output_stride_h, output_stride_s,
    output_stride_d, q_len, kv_len, tiles, columns, width, HEADS, GROUP, qk_scale, NEGATIVE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_LOG2: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one query block and head: an online softmax over the means of its dropped blocks.

    merged has output's strides. lse and sums are contiguous. qk_scale is above 0, and the opposite where NEGATIVE.
    Where MASKED, every tile is treated as the last one, which is less code.
    """
    # the longest rows start first
    first_row = (tiles - 1 - tl.program_id(0)) * ROWS
    batch_head = tl.program_id(1).to(tl.int64)
    I = first_row // BLOCK
    row = first_row + tl.arange(0, ROWS)
    inside = row < q_len
    seen = kv_len - q_len + I * BLOCK + 1  # positions that every row of the query block sees
    # the last row may be a query block of its own, and sees a short last key block to its end
    whole = tl.where(seen == kv_len, columns, seen // BLOCK)
    end = whole if MASKED else seen // BLOCK // TILE * TILE
    words_row = words_ptr + (batch_head * ((q_len + BLOCK - 1) // BLOCK) + I) * width

    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    query_base = query_ptr + (batch_head // HEADS) * query_stride_b + (batch_head % HEADS) * query_stride_h
    q_offsets = row.to(tl.int64)[:, None] * query_stride_s + d[None, :] * query_stride_d
    queries = tl.load(query_base + q_offsets, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    if NEGATIVE:
        queries = -queries
    key_base = key_means_ptr + (batch_head // GROUP) * columns * D
    value_base = value_means_ptr + (batch_head // GROUP) * columns * DV

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DV_PAD], tl.float32)
    low = tl.load(words_row)
    high = tl.load(words_row + 1, mask=width > 1, other=-1)
    for j0 in range(0, end, TILE):
        # the next tile's words arrive while this one is multiplied
        w = (j0 + TILE) // 32
        next_low = tl.load(words_row + w, mask=w < width, other=-1)
        next_high = tl.load(words_row + w + 1, mask=w + 1 < width, other=-1)
        best, total, mean = _add_tile(
            j0, low, high, best, total, mean, queries, key_base, value_base, kv_len, whole, qk_scale, D, D_PAD, DV,
            DV_PAD, BLOCK, BLOCK_LOG2, TILE, MASKED,
        )  # fmt: skip
        low = next_low
        high = next_high
    if not MASKED and end < whole:
        best, total, mean = _add_tile(
            end, low, high, best, total, mean, queries, key_base, value_base, kv_len, whole, qk_scale, D, D_PAD,
            DV, DV_PAD, BLOCK, BLOCK_LOG2, TILE, True,
        )  # fmt: skip
    best += BLOCK_LOG2

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


def _options(query: Tensor, value_dim: int) -> dict[str, int | bool]:
    """ROWS at most, TILE, MASKED, warps and stages."""
    wide = max(query.shape[3], value_dim) > 128
    if query.dtype == torch.float32 and query.is_cuda:
        # exact products need many registers, and no tensor core computes them
        return {"ROWS": 32 if wide else 64, "TILE": 32, "MASKED": True, "num_warps": 8, "num_stages": 1}
    if wide:
        return {"ROWS": 64, "TILE": 64, "MASKED": False, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "TILE": 64, "MASKED": False, "num_warps": 8, "num_stages": 3}


def hopper_merges(query: Tensor, output: Tensor, block_size: int, scale: float) -> bool:
    """Whether hopper_mean_correction.merge_means_kernel can do this call."""
    return (
        hopper_copies(query)
        and hopper_copies(output)
        and query.shape == output.shape
        and block_size == 128
        and scale > 0
    )


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
    value_dim, dtype, columns = value_means.shape[3], output.dtype, key_means.shape[2]
    if not query.is_cuda:
        # Triton's interpreter has a wrong dot for bfloat16; products of bfloat16 are exact in float32
        query, key_means, value_means, output = (x.float() for x in (query, key_means, value_means, output))
    merged = torch.empty_like(output)
    lse = lse.contiguous()
    sums = torch.empty_like(lse)
    shared = {
        "words_ptr": words.contiguous(), "lse_ptr": lse, "sums_ptr": sums, "q_len": q_len, "kv_len": geometry.kv_len,
        "columns": columns, "width": words.shape[3], "HEADS": heads, "GROUP": heads // key_means.shape[1],
        "qk_scale": max(abs(scale) * LOG2_E, SMALLEST_SCALE), "D": head_dim,
    }  # fmt: skip
    if hopper_merges(query, output, geometry.block_size, scale):
        from flexprefill.attention import hopper_mean_correction as hopper  # imports triton's Gluon

        launch(
            hopper.merge_means_kernel, (geometry.rows * batch * heads,), rows=geometry.rows, heads=batch * heads,
            **hopper.describe(query, key_means, value_means, output, merged),
            num_warps=hopper.WARPS, maxnreg=hopper.REGISTERS, **shared,
        )  # fmt: skip
        return merged, sums
    options = _options(query, value_dim)
    options["ROWS"] = min(options["ROWS"], geometry.block_size)
    tiles = ceil_div(q_len, options["ROWS"])
    launch(
        merge_means_kernel, (tiles, batch * heads), query, key_means, value_means, output_ptr=output, merged_ptr=merged,
        **{f"query_stride_{name}": stride for name, stride in zip("bhsd", query.stride(), strict=True)},
        **{f"output_stride_{name}": stride for name, stride in zip("bhsd", output.stride(), strict=True)},
        tiles=tiles, NEGATIVE=scale < 0, D_PAD=triton.next_power_of_2(head_dim), DV=value_dim,
        DV_PAD=triton.next_power_of_2(value_dim), BLOCK=geometry.block_size,
        BLOCK_LOG2=geometry.block_size.bit_length() - 1, **options, **shared,
    )  # fmt: skip
    return merged.to(dtype), sums
