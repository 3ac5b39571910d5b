"""Launches the search's kernels. One pools the keys. One scores the blocks, finds thresholds and writes the bits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexprefill.blockmap.bits import WORD_BITS
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.runtime.devices import is_hopper, multiprocessors
from flexprefill.runtime.launching import launch
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.runtime.state import remembered
from flexprefill.search.kernels.pooling import pool_kernel, pool_pages_kernel, pool_sequences_kernel
from flexprefill.search.kernels.scoring import SMALLEST_LOG2_ALPHA, search_kernel
from flexprefill.search.rule import Rule, log2_alphas_on
from flexprefill.variant.logits import LOG2_E
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import PLAIN, AttentionVariant

SMALLEST_SCALE = 2.0**-126
TILE = 64  # means a step: the first operand of the product, one warpgroup's rows
QUERY_ROWS = 128  # of the neighbouring query blocks that share each tile of means
WARPS = 4
STAGES = 1  # buffers of means: a second one costs registers, and room for another program
LARGEST_STEP = 64  # words for which one step reads the scores
GLUON_VERSIONS = ("3.6.", "3.7.")  # of Triton; hopper.py is written in its experimental dialect


class SearchLaunch(NamedTuple):
    """How score_words launches a kernel. It depends on shapes and dtype alone: nothing is tuned at run time."""

    hopper: bool  # hopper.search_kernel
    d_step: int  # of the head dimension, a product
    programs: int  # a multiprocessor
    registers: int | None  # a cap for each thread


# Measured on an H200 (docs/explanations/search_kernels.md)
def _launch(query: Tensor, rule: Rule, plain: bool) -> SearchLaunch:
    if plain and hopper_takes(query, rule):
        return SearchLaunch(True, 128, 4, 128)
    if query.dtype == torch.float32 and query.is_cuda:
        # its products are exact, not from tensor cores, and registers are few
        return SearchLaunch(False, 32, 2, None)
    if query.shape[3] > 128 or rule.kv_masks:
        # the loop over the group's heads, around that over tiles, takes registers too
        return SearchLaunch(False, 256, 2, None)
    return SearchLaunch(False, 128, 3, 168)


def hopper_copies(tensor: Tensor) -> bool:
    """Whether a Hopper GPU's kernels can copy blocks of a tensor [B, H, S, D] by themselves: the common case."""
    # the tensor memory accelerator reads no other layout
    aligned = tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in tensor.stride()[:3])
    return (
        tensor.is_cuda
        and is_hopper(tensor.device)
        and triton.__version__.startswith(GLUON_VERSIONS)
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and tensor.shape[3] in (64, 128)
        and tensor.stride(3) == 1
        and aligned
    )


def hopper_takes(query: Tensor, rule: Rule) -> bool:
    """Whether hopper.search_kernel can do this search."""
    return (
        hopper_copies(query)
        and rule.block_size == 128
        and rule.min_blocks == 0
        and not rule.kv_masks
        and math.copysign(1, rule.scale) > 0
        and rule.log2_alpha >= SMALLEST_LOG2_ALPHA.value
    )


def pool_keys(key: Tensor, block_size: int, sequences: Sequences | None = None) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D].

    With sequences, the means and their order are those of reference.pool_own_keys.
    """
    batch, heads, kv_len, head_dim = key.shape
    columns = ceil_div(kv_len, block_size)
    # the interpreter truncates to bfloat16 instead of rounding, so it rounds outside
    dtype = key.dtype if key.is_cuda else torch.float32
    rows = columns if sequences is None else 2 * columns + kv_len
    needed = batch * heads * rows * head_dim * dtype.itemsize
    with room_for("the search's block means", needed, key.device, "take fewer sequences at a time"):
        means = torch.empty(batch, heads, rows, head_dim, dtype=dtype, device=key.device)
    arguments = key, means, *key.stride(), kv_len, columns, heads
    sizes = {"D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "BLOCK": block_size}
    # one warp reads at 4.2 TB/s on an H200, 4 at 3.2
    ends = (means, 0) if sequences is None else (sequences.ends, _entry_stride(sequences.ends))
    grid = columns, batch * heads
    launch(pool_kernel, grid, *arguments, *ends, **sizes, SEQUENCES=sequences is not None, num_warps=1)
    if sequences is not None:
        launch(pool_sequences_kernel, grid, *arguments, sequences.starts, *ends, **sizes, num_warps=8)
    return means.to(key.dtype)


def pool_pages(paged: PagedKV, block_size: int, wanted: Tensor | None = None) -> Tensor:
    """Means of the key blocks in pages, [B, Hkv, N, D] in the keys' dtype. As operator.pool_pages."""
    pages, table = paged.pages_of_keys, paged.block_table
    heads, head_dim = pages.shape[1], pages.shape[3]
    columns = ceil_div(paged.kv_len, block_size)
    dtype = pages.dtype if pages.is_cuda else torch.float32  # as in pool_keys
    means = torch.empty(paged.batch, heads, columns, head_dim, dtype=dtype, device=pages.device)
    table = table if table.stride(1) == 1 else table.contiguous()
    of_blocks = table if wanted is None else wanted.view(torch.uint8)
    launch(
        pool_pages_kernel, (columns, paged.batch * heads), pages, means, *pages.stride(), table, table.stride(0),
        of_blocks, paged.kv_len, columns, heads, PAGE=paged.page_size, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), BLOCK=block_size, WANTED=wanted is not None, num_warps=1,
    )  # fmt: skip
    return means.to(pages.dtype)


def _entry_stride(tensor: Tensor) -> int:
    """The stride of batch entries of [1 or B, S_kv]. 0 where all have the same."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def score_words(query: Tensor, means: Tensor, kv_len: int, rule: Rule, variant: AttentionVariant = PLAIN) -> Tensor:
    """A BlockMap's words, int32 [B, Hq, M, ceil(N / 32)], from what pool_keys gives. See PrefillConfig.

    Args:
        query: [B, Hq, S_q, D].
        means: [B, Hkv, N, D], or what pool_keys makes of sequences.
        kv_len: S_kv.
        rule: The settings of the call.
        variant: What the attention is besides causal.
    """
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16; products of bfloat16 are exact in float32
        query, means = query.float(), means.float()
    kind = _launch(query, rule, plain=not variant.changes_search)
    plan = _plan_search(tuple(query.shape), query.device, means.shape[1], kv_len, rule, kind)
    with room_for("the search", plan.needed, query.device, IN_CHUNKS):
        words = torch.empty(plan.words, dtype=torch.int32, device=query.device)
        scratch = torch.empty(plan.scratch, dtype=torch.float32, device=query.device)
    # where all heads have one alpha, a tensor that is not read
    alphas = log2_alphas_on(query.device, rule) if rule.log2_alphas else words
    if kind.hopper:
        from flexprefill.search.kernels import hopper

        query_tiles, means_tiles = hopper.describe_tensors(query, means)
        launch(
            hopper.search_kernel, plan.grid, query=query_tiles, means=means_tiles, qk_scale=_log2_scale(rule),
            words_ptr=words, scratch_ptr=scratch, log2_alphas_ptr=alphas, **plan.arguments,
        )  # fmt: skip
    else:
        launch(
            search_kernel, plan.grid, query_ptr=query, means_ptr=means, stride_b=query.stride(0),
            stride_h=query.stride(1), stride_s=query.stride(2), stride_d=query.stride(3), words_ptr=words,
            scratch_ptr=scratch, log2_alphas_ptr=alphas, **plan.arguments, **_terms_of(variant, rule, words, kv_len),
        )  # fmt: skip
    return words


class _SearchPlan(NamedTuple):
    """What a launch of the search needs besides tensors."""

    grid: tuple[int]
    words: tuple[int, ...]  # a shape
    scratch: tuple[int, ...]  # a shape
    needed: int  # bytes of both
    arguments: dict[str, Any]


@remembered("launches of the search", most=1024)
def _plan_search(
    shape: tuple[int, ...], device: torch.device, kv_heads: int, kv_len: int, rule: Rule, kind: SearchLaunch
) -> _SearchPlan:
    """A launch for queries of a shape. No argument depends on the sign of a scale of 0, which no key tells apart."""
    (batch, heads, q_len, head_dim), head_pad = shape, triton.next_power_of_2(shape[3])
    rows, columns = ceil_div(q_len, rule.block_size), ceil_div(kv_len, rule.block_size)
    width = ceil_div(columns, WORD_BITS)
    query_blocks = max(1, QUERY_ROWS // rule.block_size)
    members = heads // kv_heads if rule.kv_masks else 1
    tiles = batch * heads // members * ceil_div(rows, query_blocks)
    programs = min(tiles, kind.programs * multiprocessors(device))
    scratch_stride = ceil_div(width, LARGEST_STEP) * LARGEST_STEP * WORD_BITS
    shapes = (batch, heads, rows, width), (programs, members, query_blocks, scratch_stride)
    arguments = {
        "scratch_stride": scratch_stride, "q_len": q_len, "kv_len": kv_len, "rows": rows, "columns": columns,
        "width": width, "HEADS": heads, "GROUP": heads // kv_heads, "log2_alpha": rule.log2_alpha,
        "sink_blocks": rule.sink_blocks, "window_blocks": rule.window_blocks, "FIRST_KEY": rule.first_key,
        "last_full_blocks": rule.last_full_blocks, "ALPHAS": bool(rule.log2_alphas), "num_warps": WARPS,
        "maxnreg": kind.registers,
    }  # fmt: skip
    if kind.hopper:
        arguments |= {
            "offset": kv_len - q_len, "heads": batch * heads, "rows_step": programs // (batch * heads),
            "heads_step": programs % (batch * heads), "WORDS": min(LARGEST_STEP, max(8, triton.next_power_of_2(width))),
        }  # fmt: skip
    else:
        arguments |= {
            "tiles": tiles, "min_blocks": rule.min_blocks, "D": head_dim, "D_PAD": head_pad, "BLOCK": rule.block_size,
            "QUERY_BLOCKS": query_blocks, "TILE": TILE, "D_STEP": min(kind.d_step, head_pad),
            "WORDS": max(1, 32 // query_blocks), "MEMBERS": members, "num_stages": STAGES,
        }  # fmt: skip
    return _SearchPlan((programs,), *shapes, 4 * sum(map(math.prod, shapes)), arguments)


def _terms_of(variant: AttentionVariant, rule: Rule, words: Tensor, kv_len: int) -> dict[str, Any]:
    """search_kernel's arguments for a variant. Where there is no tensor they name one that is not read."""
    sequences, soft_cap, alibi_slopes = variant.sequences, variant.soft_cap, variant.alibi_slopes
    return {
        "starts_ptr": words if sequences is None else sequences.starts,
        "ends_ptr": words if sequences is None else sequences.ends,
        "sequence_stride": 0 if sequences is None else _entry_stride(sequences.starts),
        "sliding_window": min(variant.sliding_window or kv_len, kv_len),
        "qk_scale": _log2_scale(rule) if soft_cap is None and alibi_slopes is None else 1.0,
        "inner_scale": rule.scale * LOG2_E if soft_cap is None else rule.scale / soft_cap,
        "soft_cap": (soft_cap or 0.0) * LOG2_E,
        "alibi_ptr": words if alibi_slopes is None else _alibi_of_heads(alibi_slopes, rule.block_size),
        "CUT": variant.cut,
        "SEQUENCES": sequences is not None,
        "SOFT_CAP": soft_cap is not None,
        "ALIBI": alibi_slopes is not None,
    }


def _log2_scale(rule: Rule) -> float:
    """The factor on products that gives log2 scores."""
    # not 0: times a hidden product's -inf it would be NaN
    return math.copysign(max(abs(rule.scale) * LOG2_E, SMALLEST_SCALE), rule.scale)


def _alibi_of_heads(slopes: Tensor, block_size: int) -> Tensor:
    """What search_kernel takes of ALiBi, float32 [3, Hq].

    The rows are the slopes, log2 of |1 - exp(-slope)|, and log2 of a whole block's mean share where its nearest key
    has 1.
    """
    falling = -slopes.double()
    shares = [torch.expm1(falling * keys).abs().log2() for keys in (1, block_size)]
    whole_ratio = torch.where(slopes == 0, 0.0, shares[1] - shares[0] - math.log2(block_size))
    return torch.stack([slopes, shares[0], whole_ratio]).float()
