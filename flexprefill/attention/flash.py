"""FlashAttention-4 called by itself, over listed blocks and dense.

FlexAttention reaches the same kernel through torch.compile. Its entry takes longer on the host than the kernel's own.
And a soft cap that FlexAttention translates has no tanh instruction.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from flexprefill.blockmap.block_mask import ListedBlocks
from flexprefill.runtime.thread_state import without_dispatch_modes

BLOCK = 128  # tokens of a block
ALIGNMENT = 16  # bytes: tensors begin at a multiple of it

_turn = threading.Lock()  # threads that find a kind of call new at once would all compile it


class FlashMods(NamedTuple):
    """What FlashAttention-4 does by itself besides causal attention."""

    soft_cap: float | None = None  # scores become soft_cap · tanh(score / soft_cap)
    sliding_window: int | None = None  # keys that a query sees, its own the last


def flash_over(
    query: Tensor, key: Tensor, value: Tensor, listed: ListedBlocks, scale: float, mods: FlashMods, needs_lse: bool
) -> tuple[Tensor, AuxOutput]:
    """Causal attention over listed blocks. Their own masks are not read: ``mods`` says what they hide.

    Args:
        query: As in prefill_attention, checked, with a last stride of 1.
        key: Likewise.
        value: Likewise.
        listed: The kept blocks, of `BLOCK` tokens.
        scale: Factor on the dot products.
        mods: What the attention is besides causal. Each combination is compiled once, which takes seconds.
        needs_lse: Whether to return log-sum-exps.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # an optional package

    from flexprefill.attention import flash_mods

    counts, indices, full_counts, full_indices = listed.lists
    blocks = BlockSparseTensorsTorch(counts, indices, full_counts, full_indices, (BLOCK, BLOCK))
    with without_dispatch_modes():
        output = _like_query(query, value.shape[3])
        _, lse = _forward(
            (query, key, value),
            softmax_scale=scale if mods.soft_cap is None else scale / mods.soft_cap,
            score_mod=flash_mods.soft_capped(mods.soft_cap),
            mask_mod=flash_mods.causal_within(mods.sliding_window),
            out=output.transpose(1, 2),
            return_lse=needs_lse,
            block_sparse_tensors=blocks,
        )
    return output, AuxOutput(lse=lse if needs_lse else None)


def flash_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last S_q of S_kv positions over all keys before them: [B, Hq, S_q, Dv]."""
    output, _ = _forward((query, key, value), softmax_scale=scale, causal=True)
    return output.transpose(1, 2)


def _forward(tensors: tuple[Tensor, Tensor, Tensor], **settings: Any) -> tuple[Tensor, Tensor | None]:
    """The package's entry below its autograd function, which is what torch's own FlexAttention calls."""
    from flash_attn.cute.interface import _flash_attn_fwd

    heads_inside = (_aligned(tensor.detach()).transpose(1, 2) for tensor in tensors)  # [B, S, H, D]
    # kernels are launched on the current device, and the tensors may be on another
    with torch.cuda.device_of(tensors[0]), _turn:
        return _flash_attn_fwd(*heads_inside, **settings)


def _like_query(query: Tensor, value_dim: int) -> Tensor:
    """Memory for [B, Hq, S_q, Dv], dense, with the order of query's strides, as FlexAttention's outputs."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, value_dim)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
