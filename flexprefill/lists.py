"""A map's bits as the index lists that FlexAttention reads: one custom operator, in PyTorch and in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap import ceil_div, unpack_bits


def full_blocks(q_len: int, kv_len: int, block_size: int, device: torch.device | str) -> Tensor:
    """How many leading key blocks every row of a query block sees whole: int32 [M].

    A short last key block counts as its nominal size, so it is never whole and keeps its bounds check.
    """
    first_row = torch.arange(ceil_div(q_len, block_size), device=device, dtype=torch.int32) * block_size
    return (first_row + (kv_len - q_len) + 1) // block_size


@torch.library.custom_op("flexprefill::index_lists", mutates_args=())
def index_lists(
    words: Tensor, q_len: int, kv_len: int, block_size: int, all_partial: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ascending lists of partial and of full blocks, zeros behind the last entry.

    Args:
        words: int32 [B, H, M, ceil(N / 32)], a BlockMap's.
        all_partial: puts every block into the partial list, not only those that the causal edge crosses.

    Returns:
        partial counts [B, H, M], partial indices [B, H, M, N], full counts, full indices; int32, contiguous.
    """
    if words.is_cuda:
        from flexprefill import lists_kernel  # imports triton

        # Triton launches on the current device, which need not be the words'
        with torch.cuda.device_of(words):
            return lists_kernel.index_lists(words, q_len, kv_len, block_size, all_partial)
    columns = ceil_div(kv_len, block_size)
    kept = unpack_bits(words, columns)
    J = torch.arange(columns, device=words.device, dtype=torch.int32)
    whole = J < full_blocks(q_len, kv_len, block_size, words.device)[:, None]
    if all_partial:
        whole = torch.zeros_like(whole)
    return *_to_list(kept & ~whole, J), *_to_list(kept & whole, J)


def _to_list(selected: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
    counts = selected.sum(-1, dtype=torch.int32)
    past_the_end = J.shape[0]
    indices = torch.where(selected, J, past_the_end).sort(-1).values
    return counts, indices.masked_fill_(indices == past_the_end, 0)


@index_lists.register_fake
def _(words, q_len, kv_len, block_size, all_partial):
    counts = words.shape[:3]
    indices = (*counts, ceil_div(kv_len, block_size))
    return tuple(words.new_empty(shape) for shape in (counts, indices, counts, indices))
