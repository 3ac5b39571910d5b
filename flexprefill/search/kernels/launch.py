"""The search's kernels, launched: one pools the keys, one scores and thresholds the blocks and writes the bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexprefill.blockmap.bits import WORD_BITS
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.runtime.devices import is_hopper, multiprocessors
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.search.kernels.pooling import pool_kernel, pool_sequences_kernel
from flexprefill.search.kernels.scoring import SMALLEST_LOG2_ALPHA, search_kernel
from flexprefill.search.rule import Rule, log2_alphas_on
from flexprefill.variant.logits import LOG2_E
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import PLAIN, AttentionVariant

SMALLEST_SCALE = 2.0**-126
LARGEST_STEP = 64  # words that a step turns scores into, reading all their scores
GLUON_VERSIONS = ("3.6.", "3.7.")  # of Triton; hopper.py is written in its experimental dialect


class SearchLaunch(NamedTuple):
    """How score_words launches a kernel. The choice depends on shapes and dtype alone: nothing is tuned at run time."""

    hopper: bool  # hopper.search_kernel
    tile: int  # means a step: the first operand of the product, one warpgroup's rows
    query_rows: int  # of the neighbouring query blocks that share each tile of means
    d_step: int  # of the head dimension, a product
    warps: int
    stages: int
    programs: int  # a multiprocessor
    registers: int | None  # a cap a thread


# Measured on an H200 (docs/explanations/search.md)
def _launch(query: Tensor, rule: Rule, plain: bool) -> SearchLaunch:
    head_dim = query.shape[3]
    if plain and hopper_takes(query, rule):
        return SearchLaunch(True, 64, 128, 128, 4, 1, 4, 128)
    if query.dtype == torch.float32 and query.is_cuda:
        # its products are exact, not tensor-core ones, and registers are few
        return SearchLaunch(False, 64, 128, 32, 4, 2, 2, None)
    if head_dim > 128 or rule.kv_masks:
        # a loop over the group's heads around the tiles' takes registers too
        return SearchLaunch(False, 64, 128, 256, 4, 2, 2, None)
    return SearchLaunch(False, 64, 128, 128, 4, 2, 3, 168)


def hopper_takes(query: Tensor, rule: Rule) -> bool:
    """Whether hopper.search_kernel can do this search: the common case, on a Hopper GPU."""
    # what the tensor memory accelerator reads
    aligned = query.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in query.stride()[:3])
    return (
        query.is_cuda
        and is_hopper(query.device)
        and triton.__version__.startswith(GLUON_VERSIONS)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] in (64, 128)
        and query.stride(3) == 1
        and aligned
        and rule.block_size == 128
        and rule.min_blocks == 0
        and not rule.kv_masks
        and math.copysign(1, rule.scale) > 0
        and rule.log2_alpha >= SMALLEST_LOG2_ALPHA.value
    )


def pool_keys(key: Tensor, block_size: int, sequences: Sequences | None = None) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D].

    With sequences, the means are those of reference.pool_own_keys, in its order.
    """
    batch, heads, kv_len, head_dim = key.shape
    columns = ceil_div(kv_len, block_size)
    # the interpreter truncates to bfloat16 instead of rounding: there, round outside
    dtype = key.dtype if key.is_cuda else torch.float32
    rows = columns if sequences is None else 2 * columns + kv_len
    needed = batch * heads * rows * head_dim * dtype.itemsize
    with room_for("the search's block means", needed, key.device, "take fewer sequences at a time"):
        means = torch.empty(batch, heads, rows, head_dim, dtype=dtype, device=key.device)
    arguments = key, means, *key.stride(), kv_len, columns, heads
    sizes = {"D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "BLOCK": block_size}
    # one warp reads at 4.2 TB/s on an H200, 4 at 3.2
    if sequences is None:
        pool_kernel[(columns, batch * heads)](*arguments, means, 0, **sizes, SEQUENCES=False, num_warps=1)
    else:
        starts, ends = sequences.starts, sequences.ends
        ends_of = ends, _entry_stride(ends)
        pool_kernel[(columns, batch * heads)](*arguments, *ends_of, **sizes, SEQUENCES=True, num_warps=1)
        pool_sequences_kernel[(columns, batch * heads)](*arguments, starts, *ends_of, **sizes, num_warps=8)
    return means.to(key.dtype)


def _entry_stride(tensor: Tensor) -> int:
    """The stride of batch entries of [1 or B, S_kv]; 0 where all have the same."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


class _Search(NamedTuple):
    """One call's search, and where a kernel puts it."""

    query: Tensor
    means: Tensor
    kv_len: int
    rule: Rule
    launch: SearchLaunch
    tiles: int  # of neighbouring query blocks, of all masks
    words: Tensor  # int32 [B, Hq, query blocks, words]
    scratch: Tensor  # float32 [programs, query heads that share a mask, neighbouring query blocks, scores]


def score_words(query: Tensor, means: Tensor, kv_len: int, rule: Rule, variant: AttentionVariant = PLAIN) -> Tensor:
    """A BlockMap's words, int32 [B, Hq, M, ceil(N / 32)], from what pool_keys gives. See PrefillConfig.

    Args:
        means: [B, Hkv, N, D], or what pool_keys makes of sequences.
    """
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16; products of bfloat16 are exact in float32
        query, means = query.float(), means.float()
    batch, heads, q_len, _ = query.shape
    rows = ceil_div(q_len, rule.block_size)
    width = ceil_div(ceil_div(kv_len, rule.block_size), WORD_BITS)
    launch = _launch(query, rule, plain=not variant.changes_search)
    query_blocks = max(1, launch.query_rows // rule.block_size)
    members = heads // means.shape[1] if rule.kv_masks else 1
    tiles = batch * heads // members * ceil_div(rows, query_blocks)
    programs = min(tiles, launch.programs * multiprocessors(query.device))
    scratch_stride = ceil_div(width, LARGEST_STEP) * LARGEST_STEP * WORD_BITS
    shapes = (batch, heads, rows, width), (programs, members, query_blocks, scratch_stride)
    with room_for("the search", 4 * sum(map(math.prod, shapes)), query.device, IN_CHUNKS):
        words = torch.empty(shapes[0], dtype=torch.int32, device=query.device)
        scratch = torch.empty(shapes[1], dtype=torch.float32, device=query.device)
    search = _Search(query, means, kv_len, rule, launch, tiles, words, scratch)
    if launch.hopper:
        _search_on_hopper(search)
    else:
        _search_anywhere(search, variant)
    return words


def _search_on_hopper(search: _Search) -> None:
    """Fills the words by hopper.search_kernel."""
    from flexprefill.search.kernels import hopper

    query, rule, words, kv_len = search.query, search.rule, search.words, search.kv_len
    batch, heads, rows, width = words.shape
    programs, _, _, scratch_stride = search.scratch.shape
    query_tiles, means_tiles = hopper.describe_tensors(query, search.means)
    hopper.search_kernel[(programs,)](
        query=query_tiles, means=means_tiles, words_ptr=words, scratch_ptr=search.scratch,
        scratch_stride=scratch_stride, offset=kv_len - query.shape[2], q_len=query.shape[2], kv_len=kv_len,
        rows=rows, columns=ceil_div(kv_len, rule.block_size), width=width, heads=batch * heads, HEADS=heads,
        rows_step=programs // (batch * heads), heads_step=programs % (batch * heads), qk_scale=_log2_scale(rule),
        log2_alpha=rule.log2_alpha, sink_blocks=rule.sink_blocks, window_blocks=rule.window_blocks,
        last_full_blocks=rule.last_full_blocks, log2_alphas_ptr=_alphas_of_heads(search),
        GROUP=heads // search.means.shape[1], FIRST_KEY=rule.first_key,
        WORDS=min(LARGEST_STEP, max(8, triton.next_power_of_2(width))), ALPHAS=bool(rule.log2_alphas),
        num_warps=search.launch.warps, maxnreg=search.launch.registers,
    )  # fmt: skip


def _search_anywhere(search: _Search, variant: AttentionVariant) -> None:
    """Fills the words by scoring.search_kernel."""
    query, rule, words, kv_len, launch = search.query, search.rule, search.words, search.kv_len, search.launch
    _, heads, q_len, head_dim = query.shape
    programs, members, query_blocks, scratch_stride = search.scratch.shape
    soft_cap, alibi_slopes = variant.soft_cap, variant.alibi_slopes
    # a kernel does not read what it is not compiled for
    starts, ends, sequence_stride = words, words, 0
    if variant.sequences is not None:
        starts, ends = variant.sequences.starts, variant.sequences.ends
        sequence_stride = _entry_stride(starts)
    modified = soft_cap is not None or alibi_slopes is not None
    head_pad = triton.next_power_of_2(head_dim)
    search_kernel[(programs,)](
        query_ptr=query, means_ptr=search.means, words_ptr=words, scratch_ptr=search.scratch,
        stride_b=query.stride(0), stride_h=query.stride(1), stride_s=query.stride(2), scratch_stride=scratch_stride,
        q_len=q_len, kv_len=kv_len, rows=words.shape[2], columns=ceil_div(kv_len, rule.block_size),
        width=words.shape[3], tiles=search.tiles, HEADS=heads, GROUP=heads // search.means.shape[1],
        qk_scale=1.0 if modified else _log2_scale(rule), log2_alpha=rule.log2_alpha, sink_blocks=rule.sink_blocks,
        window_blocks=rule.window_blocks, last_full_blocks=rule.last_full_blocks, min_blocks=rule.min_blocks,
        stride_d=query.stride(3), starts_ptr=starts, ends_ptr=ends, sequence_stride=sequence_stride,
        sliding_window=min(variant.sliding_window or kv_len, kv_len),
        inner_scale=rule.scale * LOG2_E if soft_cap is None else rule.scale / soft_cap,
        soft_cap=(soft_cap or 0.0) * LOG2_E,
        alibi_ptr=words if alibi_slopes is None else _alibi_of_heads(alibi_slopes, rule.block_size),
        log2_alphas_ptr=_alphas_of_heads(search), D=head_dim, D_PAD=head_pad, BLOCK=rule.block_size,
        QUERY_BLOCKS=query_blocks, TILE=launch.tile, D_STEP=min(launch.d_step, head_pad),
        WORDS=max(1, 32 // query_blocks), MEMBERS=members, FIRST_KEY=rule.first_key,
        CUT=variant.sequences is not None or variant.sliding_window is not None,
        SEQUENCES=variant.sequences is not None, SOFT_CAP=soft_cap is not None, ALIBI=alibi_slopes is not None,
        ALPHAS=bool(rule.log2_alphas), num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip


def _log2_scale(rule: Rule) -> float:
    """The factor on products that gives log2 scores."""
    # not 0, which times a hidden product's -inf would be NaN
    return math.copysign(max(abs(rule.scale) * LOG2_E, SMALLEST_SCALE), rule.scale)


def _alphas_of_heads(search: _Search) -> Tensor:
    """The heads' log2_alphas; where all have the same, a tensor that is not read."""
    rule = search.rule
    return log2_alphas_on(search.query.device, rule) if rule.log2_alphas else search.words


def _alibi_of_heads(slopes: Tensor, block_size: int) -> Tensor:
    """What search_kernel takes of ALiBi, float32 [3, Hq]: slopes, log2 of |1 - exp(-slope)|, log2 of a whole block's
    mean share, its nearest key's being 1.
    """
    falling = -slopes.double()
    shares = [torch.expm1(falling * keys).abs().log2() for keys in (1, block_size)]
    whole_ratio = torch.where(slopes == 0, 0.0, shares[1] - shares[0] - math.log2(block_size))
    return torch.stack([slopes, shares[0], whole_ratio]).float()
