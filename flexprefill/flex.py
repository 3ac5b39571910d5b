"""BlockMap to FlexAttention's BlockMask and back, and the mask_mods that go with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from flexprefill.blockmap import BlockMap, ceil_div
from flexprefill.checks import check_config
from flexprefill.config import PrefillConfig
from flexprefill.lists import ListBuffers, Lists, make_lists
from flexprefill.recording import note
from flexprefill.search import KeyMeans, search_blocks

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod of a whole prompt: a query sees its own and earlier positions."""
    return q_idx >= kv_idx


def causal_mask_at(offset: Tensor) -> MaskMod:
    """mask_mod of queries that stand at ``offset`` among the keys: int32 [B], one for each batch entry.

    A tensor, because a mask_mod that closes over a Python int is compiled anew for each value; and not a 0-d one,
    because FlashAttention-4 takes captured tensors by an index alone.
    """

    def causal_mask_at_offset(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + offset[b] >= kv_idx

    return causal_mask_at_offset


def query_offset(block_map: BlockMap) -> Tensor | None:
    """The ``offset`` of :func:`causal_mask_at` for a map; None for a whole prompt, whose mask needs none."""
    if block_map.offset == 0:
        return None
    return offsets_at(block_map, block_map.offset)


def offsets_at(block_map: BlockMap, position: int) -> Tensor:
    """The ``offset`` of :func:`causal_mask_at` for queries of a map's batch that start at a position."""
    # filled on the device: a copy from the host would wait, and cannot be captured
    return torch.full((block_map.words.shape[0],), position, dtype=torch.int32, device=block_map.device)


def create_prefill_block_mask(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    implementation: str = "auto",
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
) -> BlockMask:
    """The BlockMask of the blocks that :func:`search_blocks` finds, for a compiled flex_attention.

    Args:
        query, key, config, scale, last_chunk, implementation, means: as in :func:`search_blocks`.
        mask_mod: a further mask_mod that hides elements; it is applied inside the kept blocks, and the
            search does not know of it.
        buffers: memory for the index lists, as in :meth:`BlockMap.to_block_mask`.

    Returns:
        A BlockMask for [B, Hq, S_q, S_kv], causal per element. Call flex_attention under torch.compile with
        it: outside, FlexAttention ignores the block lists and is dense.

    Raises:
        TypeError, ValueError: as :func:`search_blocks`, or ``config.mean_correction`` is set.
    """
    check_config(config)
    if config.mean_correction:
        raise ValueError(
            "config.mean_correction is more than a BlockMask can say: call prefill_attention, or pass a config with "
            "mean_correction=False"
        )
    block_map = search_blocks(
        query, key, config, scale=scale, last_chunk=last_chunk, implementation=implementation, means=means
    )
    return to_block_mask(block_map, mask_mod, buffers)


def to_block_mask(
    block_map: BlockMap, mask_mod: MaskMod | None = None, buffers: ListBuffers | None = None
) -> BlockMask:
    """See BlockMap.to_block_mask."""
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function of (b, h, q_idx, kv_idx), got {type(mask_mod).__name__}")
    note(block_map)
    lengths = block_map.q_len, block_map.kv_len
    lists = lists_of(block_map, mask_mod, buffers)
    return block_mask_of(lists, lengths, block_map.block_size, query_offset(block_map), mask_mod)


def lists_of(block_map: BlockMap, mask_mod: MaskMod | None, buffers: ListBuffers | None) -> Lists:
    """The index lists of a map whose blocks a further mask_mod may cut; see index_lists."""
    sizes = block_map.q_len, block_map.kv_len, block_map.block_size
    return make_lists(block_map.words, *sizes, mask_mod is not None, buffers)


def block_mask_of(
    lists: Lists,
    lengths: tuple[int, int],
    block_size: int,
    offset: Tensor | None,
    mask_mod: MaskMod | None,
) -> BlockMask:
    """The BlockMask of what :func:`lists_of` and :func:`query_offset` give, causal per element.

    Args:
        lengths: of queries and of keys.
    """
    causal = causal_mask if offset is None else causal_mask_at(offset)
    return BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=block_size,
        mask_mod=causal if mask_mod is None else and_masks(causal, mask_mod),
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


def from_block_mask(block_mask: BlockMask) -> BlockMap:
    """See BlockMap.from_block_mask."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    if block_mask.BLOCK_SIZE[0] != block_mask.BLOCK_SIZE[1]:
        raise ValueError(f"block_mask must have square blocks, got BLOCK_SIZE={block_mask.BLOCK_SIZE}")
    q_len, kv_len = block_mask.seq_lengths
    if q_len > kv_len:
        raise ValueError(f"block_mask must have no more queries than keys, got seq_lengths={(q_len, kv_len)}")
    block_size = block_mask.BLOCK_SIZE[0]
    columns = ceil_div(kv_len, block_size)
    if block_mask.kv_num_blocks.dim() != 3 or block_mask.kv_num_blocks.shape[2] != ceil_div(q_len, block_size):
        raise ValueError(
            f"block_mask must list {ceil_div(q_len, block_size)} rows of blocks [B, H, rows] for q_len={q_len}, "
            f"got {list(block_mask.kv_num_blocks.shape)}: a slice of rows has no place among the keys"
        )
    kept = _to_dense(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    if block_mask.full_kv_num_blocks is not None:
        kept |= _to_dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    return BlockMap.from_dense(kept, q_len=q_len, kv_len=kv_len, block_size=block_size)


def _to_dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # entries behind the count may hold anything: they go to a column that is cut off
    targets = torch.where(listed, indices, columns).to(torch.int64)
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, targets, True)[..., :-1]
