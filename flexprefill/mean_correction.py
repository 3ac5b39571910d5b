"""Mean correction: dropped blocks answer with their mean key and value (FlashPrefill-V2, arXiv 2608.19758).

A block (I, J) that is dropped although every row of query block I sees all of J takes part in the softmax as one more
key: its logit is scale · q · K̄_J + ln |J| and its value V̄_J, with K̄_J and V̄_J the means of J's keys and values, kept
in their dtype, and |J| the number of its keys. Computed as a second, small attention over the means, under the
complement of the mask, that is merged with the first by their log-sum-exps.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap, ceil_div, unpack_bits
from flexprefill.lists import full_blocks
from flexprefill.log_sum_exp import kept_log_sum_exp
from flexprefill.operators import operator
from flexprefill.search import op

PIECE = 2**24  # logits at a time


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
        lse = kept_log_sum_exp(query, key, block_map.words, key.shape[2], block_map.block_size, scale)
    implementation = "triton" if query.is_cuda else "reference"
    return merge_means(query, key, value, block_map.words, output, lse, block_map.block_size, scale, implementation)


def whole_blocks(q_len: int, kv_len: int, block_size: int, device: torch.device | str) -> Tensor:
    """How many leading key blocks every row of a query block sees to their last key: int32 [M]."""
    whole = full_blocks(q_len, kv_len, block_size, device)
    if q_len % block_size == 1:  # the last row is a query block of its own, and sees a short last key block to its end
        whole[-1] = ceil_div(kv_len, block_size)
    return whole


@operator("flexprefill::merge_means")
def merge_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`add_dropped_blocks`, by "reference" or "triton".

    Args:
        words: int32 [B, Hq, M, ceil(N / 32)], a BlockMap's.
    """
    key_means = op.pool_keys(key, block_size, implementation)  # [B, Hkv, N, D]
    value_means = op.pool_keys(value, block_size, implementation)  # [B, Hkv, N, Dv]
    inputs = query, key_means, value_means, words, output, lse, key.shape[2], block_size, scale
    if implementation == "reference":
        return merge_in_pieces(*inputs)
    from flexprefill import mean_correction_kernel  # imports triton

    with torch.cuda.device_of(query):
        return mean_correction_kernel.merge(*inputs)


@torch.library.register_fake("flexprefill::merge_means")
def _(query, key, value, words, output, lse, block_size, scale, implementation):
    return torch.empty_like(output), lse.new_empty(lse.shape)


def merge_in_pieces(
    query: Tensor,
    key_means: Tensor,
    value_means: Tensor,
    words: Tensor,
    output: Tensor,
    lse: Tensor,
    kv_len: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch: float32, some query blocks of one head at a time."""
    batch, heads, q_len, _ = query.shape
    group, columns = heads // key_means.shape[1], key_means.shape[2]
    J = torch.arange(columns, device=query.device)
    log_sizes = (kv_len - J * block_size).clamp(max=block_size).log()
    whole = J < whole_blocks(q_len, kv_len, block_size, query.device)[:, None]
    merged, sums = torch.empty_like(output), lse.new_empty(lse.shape)
    blocks_a_piece = max(1, PIECE // (block_size * columns))
    for first in range(0, words.shape[2], blocks_a_piece):
        rows = slice(first * block_size, min((first + blocks_a_piece) * block_size, q_len))
        blocks = slice(first, first + blocks_a_piece)
        for b, h in product(range(batch), range(heads)):
            dropped = whole[blocks] & ~unpack_bits(words[b, h, blocks], columns)
            dropped = dropped.repeat_interleave(block_size, 0)[: rows.stop - rows.start]
            logits = scale * (query[b, h, rows].float() @ key_means[b, h // group].float().T) + log_sizes  # [rows, N]
            logits = logits.masked_fill(~dropped, -torch.inf)
            of_kept = lse[b, h, rows].float()
            total = torch.logaddexp(of_kept, logits.logsumexp(-1))
            shift = torch.where(total == -torch.inf, 0, total)  # a row with nothing at all stays zero
            share = (of_kept - shift).exp()[:, None]
            of_means = (logits - shift[:, None]).exp() @ value_means[b, h // group].float()
            # a row that keeps nothing may come as anything; a share that is NaN stays one
            of_output = torch.where(share == 0, 0, share * output[b, h, rows].float())
            merged[b, h, rows] = (of_output + of_means).to(output.dtype)
            sums[b, h, rows] = total
    return merged, sums
