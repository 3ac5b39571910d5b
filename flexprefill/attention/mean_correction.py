"""Mean correction: dropped blocks answer with their mean key and value (FlashPrefill-V2, arXiv 2608.19758).

A dropped block (I, J) takes part if every row of query block I sees all of J. It enters the softmax as one more key.
Its logit is scale · q · K̄_J + ln |J|, and its value is V̄_J. K̄_J and V̄_J are the means of J's keys and values, in their
dtype, and |J| is the number of its keys. The means get a second, small attention under the complement of the mask. It
is merged with the first one by their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.attention.call import Call
from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry, full_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.runtime.operators import operator
from flexprefill.search.operator import pool_keys
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN


def add_dropped_blocks(
    call: Call, kept: BlockMap, output: Tensor, lse: Tensor, key_means: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, merged with attention over the means of the dropped ones.

    Args:
        output: [B, Hq, S_q, Dv], over the kept blocks.
        lse: float32 [B, Hq, S_q], the natural log-sum-exps of its logits.
        key_means: [B, Hkv, N, D], as `pool_keys` gives them, where they are known.

    Returns:
        The same two with the means of the dropped blocks.
    """
    return merge_means(
        call.query,
        call.key,
        call.value,
        kept.words,
        output,
        lse,
        kept.block_size,
        call.scale,
        "triton" if call.query.is_cuda else "reference",
        key_means,
    )


@operator("flexprefill::merge_means")
def merge_means(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor, output: Tensor, lse: Tensor, block_size: int,
    scale: float, implementation: str, key_means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As add_dropped_blocks, by "reference" (the definition in plain PyTorch, float32) or "triton".

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        value: [B, Hkv, S_kv, Dv].
        words: int32 [B, Hq, M, ceil(N / 32)], a BlockMap's.
        key_means: [B, Hkv, N, D], as add_dropped_blocks takes them.
    """
    geometry = Geometry(query.shape[2], key.shape[2], block_size)
    if key_means is None:
        key_means = pool_keys(key, block_size, implementation)
    value_means = pool_keys(value, block_size, implementation)  # [B, Hkv, N, Dv]
    if implementation == "triton":
        from flexprefill.attention import mean_correction_kernel  # imports triton

        with torch.cuda.device_of(query):
            return mean_correction_kernel.merge(query, key_means, value_means, geometry, scale, words, output, lse)
    columns = geometry.columns
    kept = unpack_bits(words, columns)
    whole = full_blocks(geometry, query.device)  # leading key blocks that every row of a query block sees whole
    if geometry.q_len % block_size == 1:
        # the last row is a query block of its own, and sees a short last key block to its end
        whole[-1] = columns
    sizes = geometry.kv_len - torch.arange(columns, device=query.device) * block_size
    log_sizes = sizes.clamp(max=block_size).float().log()

    def add_log_size(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + log_sizes[kv_idx]

    def is_dropped(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        block = q_idx // block_size
        return (kv_idx < whole[block]) & ~kept[b, h, block, kv_idx]

    mods = (is_dropped,), (add_log_size,)
    attention = PlainAttention(query, key_means, scale, PLAIN, *mods, causal=False)
    of_means, sums = attention.attend(value_means)
    total = torch.logaddexp(lse.float(), sums)
    shift = torch.where(total == -torch.inf, 0, total)  # a row without anything stays zero
    share = (lse.float() - shift).exp()[..., None]
    # the output of a row that keeps nothing may hold anything; a share that is NaN stays NaN
    of_kept = torch.where(share == 0, 0, share * output.float())
    return (of_kept + (sums - shift).exp()[..., None] * of_means).to(output.dtype), total


@torch.library.register_fake("flexprefill::merge_means")
def _(query, key, value, words, output, lse, *_):
    return torch.empty_like(output), lse.new_empty(lse.shape)
