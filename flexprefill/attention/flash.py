"""FlashAttention-4 called by itself, over listed blocks and dense.

FlexAttention reaches the same kernel through torch.compile. Its entry takes longer on the host than the kernel's own.
And a soft cap that FlexAttention translates has no tanh instruction.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from flexprefill.attention.flash_calls import call_flash
from flexprefill.blockmap.block_mask import ListedBlocks
from flexprefill.runtime.thread_state import without_dispatch_modes

BLOCK = 128  # tokens of a block
ALIGNMENT = 16  # bytes: tensors begin at a multiple of it


class FlashMods(NamedTuple):
    """What FlashAttention-4 does by itself besides causal attention."""

    soft_cap: float | None = None  # scores become soft_cap · tanh(score / soft_cap)
    sliding_window: int | None = None  # keys that a query sees, its own the last


def flash_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    listed: ListedBlocks,
    scale: float,
    mods: FlashMods,
    needs_lse: bool,
    layout: Hashable | None = None,
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
        layout: Names that of query, key and value. From its second call on, a layout takes less of the host's time.
    """
    lists = listed.lists

    def settings() -> dict[str, Any]:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # an optional package

        from flexprefill.attention import flash_mods

        return {
            "softmax_scale": scale if mods.soft_cap is None else scale / mods.soft_cap,
            "score_mod": flash_mods.soft_capped(mods.soft_cap),
            "mask_mod": flash_mods.causal_within(mods.sliding_window),
            "block_sparse_tensors": BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK)),
        }

    with without_dispatch_modes():
        output = _like_query(query, value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32) if needs_lse else None
        tensors = *_heads_inside(query, key, value), output.transpose(1, 2), lse, *lists
        call_flash(tensors, settings, None if layout is None else (layout, scale, mods, needs_lse))
    return output, AuxOutput(lse=lse)


def flash_dense(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Hashable | None = None) -> Tensor:
    """Causal attention of the last S_q of S_kv positions over all keys before them: [B, Hq, S_q, Dv].

    The layout is as in flash_over.
    """
    batch, heads, length, _ = query.shape
    output = query.new_empty(batch, length, heads, value.shape[3])
    kind = None if layout is None else (layout, scale)
    tensors = *_heads_inside(query, key, value), output, None
    call_flash(tensors, lambda: {"softmax_scale": scale, "causal": True}, kind)
    return output.transpose(1, 2)


def _heads_inside(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B, H, S, D] as the package takes them, [B, S, H, D], without gradients."""
    return tuple([_readable(tensor).transpose(1, 2) for tensor in tensors])


def _like_query(query: Tensor, value_dim: int) -> Tensor:
    """Memory for [B, Hq, S_q, Dv], dense, with the order of query's strides, as FlexAttention's outputs."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, value_dim)


def _readable(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:  # while gradients are off
        tensor = tensor.detach()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
