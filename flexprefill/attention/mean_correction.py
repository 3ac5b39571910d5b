"""Mean correction: dropped blocks answer with their mean key and value (FlashPrefill-V2, arXiv 2608.19758).

A block (I, J) that is dropped although every row of query block I sees all of J takes part in the softmax as one more
key: its logit is scale · q · K̄_J + ln |J| and its value V̄_J, with K̄_J and V̄_J the means of J's keys and values, kept
in their dtype, and |J| the number of its keys. Computed as a second, small attention over the means, under the
complement of the mask, that is merged with the first by their log-sum-exps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.attention.log_sum_exp import log_sum_exp_over
from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry, full_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.runtime.operators import operator
from flexprefill.search.operator import pool_keys
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN


def add_dropped_blocks(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, output: Tensor, lse: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks to attention over the kept blocks and the means of the dropped ones.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].
        output: [B, Hq, S_q, Dv], over the map's kept blocks.
        lse: float32 [B, Hq, S_q], natural log-sum-exps of its logits; None where the kernel gives none, and then they
            are computed in plain PyTorch.

    Returns:
        The same two with the means of the dropped blocks.
    """
    if lse is None:
        lse = log_sum_exp_over(PlainAttention(query, key, scale, PLAIN), block_map)
    implementation = "triton" if query.is_cuda else "reference"
    return merge_means(query, key, value, block_map.words, output, lse, block_map.block_size, scale, implementation)


def whole_blocks(geometry: Geometry, device: torch.device | str) -> Tensor:
    """How many leading key blocks every row of a query block sees to their last key: int32 [M]."""
    whole = full_blocks(geometry, device)
    if geometry.q_len % geometry.block_size == 1:
        # the last row is a query block of its own, and sees a short last key block to its end
        whole[-1] = geometry.columns
    return whole


@operator("flexprefill::merge_means")
def merge_means(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor, output: Tensor, lse: Tensor, block_size: int,
    scale: float, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`add_dropped_blocks`, by "reference" or "triton".

    Args:
        words: int32 [B, Hq, M, ceil(N / 32)], a BlockMap's.
    """
    geometry = Geometry(query.shape[2], key.shape[2], block_size)
    key_means = pool_keys(key, block_size, implementation)  # [B, Hkv, N, D]
    value_means = pool_keys(value, block_size, implementation)  # [B, Hkv, N, Dv]
    means = Means(key_means, value_means, geometry, scale)
    if implementation == "reference":
        return merge_plainly(query, means, words, output, lse)
    from flexprefill.attention import mean_correction_kernel  # imports triton

    with torch.cuda.device_of(query):
        return mean_correction_kernel.merge(query, *means, words, output, lse)


@torch.library.register_fake("flexprefill::merge_means")
def _(query, key, value, words, output, lse, *_):
    return torch.empty_like(output), lse.new_empty(lse.shape)


class Means(NamedTuple):
    """Means of key blocks [B, Hkv, N, D] and of value blocks [B, Hkv, N, Dv], and how they are attended."""

    keys: Tensor
    values: Tensor
    geometry: Geometry
    scale: float


def merge_plainly(query: Tensor, means: Means, words: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, float32: attention over the means of dropped blocks, merged with the other."""
    geometry = means.geometry
    block_size, columns = geometry.block_size, geometry.columns
    kept, whole = unpack_bits(words, columns), whole_blocks(geometry, query.device)
    sizes = geometry.kv_len - torch.arange(columns, device=query.device) * block_size
    log_sizes = sizes.clamp(max=block_size).float().log()

    def add_log_size(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + log_sizes[kv_idx]

    def is_dropped(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        block = q_idx // block_size
        return (kv_idx < whole[block]) & ~kept[b, h, block, kv_idx]

    mods = (is_dropped,), (add_log_size,)
    attention = PlainAttention(query, means.keys, means.scale, PLAIN, *mods, causal=False)
    of_means, sums = attention.attend(means.values)
    total = torch.logaddexp(lse.float(), sums)
    shift = torch.where(total == -torch.inf, 0, total)  # a row with nothing at all stays zero
    share = (lse.float() - shift).exp()[..., None]
    # a row that keeps nothing may come as anything; a share that is NaN stays one
    of_kept = torch.where(share == 0, 0, share * output.float())
    return (of_kept + (sums - shift).exp()[..., None] * of_means).to(output.dtype), total
