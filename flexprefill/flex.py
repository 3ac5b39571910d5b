"""BlockMap to FlexAttention's BlockMask and back, and the mask_mods that go with it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from flexprefill.blockmap import BlockMap, ceil_div, pack_bits
from flexprefill.checks import MASK_MOD_ARGUMENTS, check_config, check_mod
from flexprefill.config import PrefillConfig
from flexprefill.lists import ListBuffers, Lists, make_lists
from flexprefill.masks import MaskedBlocks, MaskMod, classify_blocks
from flexprefill.operators import to_capture
from flexprefill.recording import note
from flexprefill.search import KeyMeans, search_blocks
from flexprefill.sequences import Sequences, blocks_from, first_keys


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
    return to_capture(torch.full((block_map.words.shape[0],), position, dtype=torch.int32, device=block_map.device))


def in_window(block_map: BlockMap, sliding_window: int) -> MaskMod:
    """mask_mod of queries that see so many keys, their own the last."""
    floor = offsets_at(block_map, block_map.offset - sliding_window)

    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx > q_idx + floor[b]

    return within_window


def from_first_key(first: Tensor) -> MaskMod:
    """mask_mod of queries that see no key before their first: int32 [1 or B, S_q], see sequences.first_keys."""
    if first.shape[0] == 1:
        # one index costs FlashAttention-4 less than two
        first = to_capture(first[0])

        def not_before(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kv_idx >= first[q_idx]

        return not_before

    first = to_capture(first)

    def not_before_own(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= first[b, q_idx]

    return not_before_own


def create_prefill_block_mask(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    mask_mod: MaskMod | BlockMask | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    implementation: str = "auto",
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
    sequences: Sequences | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> BlockMask:
    """The BlockMask of the blocks that :func:`search_blocks` finds, for a compiled flex_attention.

    Args:
        query, key, config, scale, last_chunk, implementation, means: as in :func:`search_blocks`.
        mask_mod: a further mask_mod that hides elements, or a BlockMask; it is applied inside the kept blocks, and the
            search does not know of it.
        buffers: memory for the index lists, as in :meth:`BlockMap.to_block_mask`.
        sequences, sliding_window: as in :func:`search_blocks`, and part of the mask.
        soft_cap, alibi_slopes: as in :func:`search_blocks`; for flex_attention itself they are a score_mod, which is
            the caller's.

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
    terms = {
        "sequences": sequences,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "alibi_slopes": alibi_slopes,
    }
    block_map = search_blocks(
        query, key, config, scale=scale, last_chunk=last_chunk, implementation=implementation, means=means, **terms
    )
    return _listed(*cut_by(block_map, mask_mod, sequences, sliding_window or 0), buffers)


def to_block_mask(
    block_map: BlockMap,
    mask_mod: MaskMod | BlockMask | None = None,
    buffers: ListBuffers | None = None,
) -> BlockMask:
    """See BlockMap.to_block_mask."""
    return _listed(*cut_by(block_map, mask_mod), buffers)


def with_mask(block_map: BlockMap, mask_mod: MaskMod) -> BlockMask:
    """See BlockMap.with_mask."""
    if mask_mod is None:
        raise TypeError("mask_mod must be a function of (b, h, q_idx, kv_idx), got NoneType")
    check_mod("mask_mod", mask_mod, MASK_MOD_ARGUMENTS)
    blocks = classify_blocks(mask_mod, block_map)
    return _listed(_without(block_map, blocks), Cut((mask_mod,), blocks.whole))


def _listed(block_map: BlockMap, cut: Cut, buffers: ListBuffers | None = None) -> BlockMask:
    note(block_map)
    lists = lists_of(block_map, cut, buffers)
    lengths = block_map.q_len, block_map.kv_len
    return block_mask_of(lists, lengths, block_map.block_size, query_offset(block_map), cut.mask_mods)


class Cut(NamedTuple):
    """What hides elements inside a map's kept blocks, besides the causal edge."""

    mask_mods: tuple[MaskMod, ...]
    uncut: Tensor | None  # words of the blocks that they leave whole; None: not known, any block may be cut
    first: Tensor | None = None  # what sequences and a window hide, of which the first mask_mod is; see first_keys


def cut_by(
    block_map: BlockMap,
    mask_mod: MaskMod | BlockMask | None,
    sequences: Sequences | None = None,
    sliding_window: int = 0,
) -> tuple[BlockMap, Cut]:
    """A map without the blocks that masks are known to empty, and what they do to the others.

    Args:
        mask_mod: a mask_mod, of which nothing is known, or a BlockMask.
        sliding_window: 0 is none.

    Raises:
        TypeError: mask_mod is neither such a function nor a BlockMask.
    """
    if not isinstance(mask_mod, BlockMask):
        check_mod("mask_mod", mask_mod, MASK_MOD_ARGUMENTS)
    mask_mods, known = [], []
    starts = None if sequences is None else sequences.starts
    first = first_keys(starts, sliding_window, block_map.q_len, block_map.kv_len, block_map.device)
    if first is not None:
        # a window alone is said with less than a number for each query
        mask_mods.append(in_window(block_map, sliding_window) if sequences is None else from_first_key(first))
        known.append(blocks_from(first, block_map))
    if isinstance(mask_mod, BlockMask):
        known.append(blocks_of_mask(mask_mod, block_map))
        mask_mods.append(mask_mod.mask_mod)
    elif mask_mod is not None:
        mask_mods.append(mask_mod)
    uncut = None
    for blocks in known:
        block_map = _without(block_map, blocks)
        uncut = blocks.whole if uncut is None else uncut & blocks.whole
    return block_map, Cut(tuple(mask_mods), uncut if len(known) == len(mask_mods) else None, first)


def _without(block_map: BlockMap, blocks: MaskedBlocks) -> BlockMap:
    return replace(block_map, words=block_map.words & blocks.left)


def blocks_of_mask(block_mask: BlockMask, block_map: BlockMap) -> MaskedBlocks:
    """What a BlockMask leaves of a map's blocks.

    Raises:
        ValueError: it is of other lengths, heads, batch, block size or device than the map.
    """
    size, (batch, heads, rows, columns) = block_map.block_size, block_map.shape
    counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
    for name, theirs, ours in (
        ("BLOCK_SIZE", block_mask.BLOCK_SIZE, (size, size)),
        ("seq_lengths", block_mask.seq_lengths, (block_map.q_len, block_map.kv_len)),
        ("device", counts.device, block_map.device),
        ("rows of blocks", counts.shape[-1], rows),
    ):
        if theirs != ours:
            raise ValueError(f"block_mask must have the map's {name} {ours}, got {theirs}")
    if counts.dim() != 3 or counts.shape[0] not in (1, batch) or counts.shape[1] not in (1, heads):
        raise ValueError(
            f"block_mask must be of batch 1 or {batch} and heads 1 or {heads}, got {list(counts.shape[:-1])}"
        )
    left = _to_dense(counts, indices, columns)
    whole = torch.zeros_like(left)
    if block_mask.full_kv_num_blocks is not None:
        whole = _to_dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    return MaskedBlocks(pack_bits(left | whole), pack_bits(whole))


def lists_of(block_map: BlockMap, cut: Cut | None, buffers: ListBuffers | None) -> Lists:
    """The index lists of a map, whose blocks may be cut; see index_lists."""
    sizes = block_map.q_len, block_map.kv_len, block_map.block_size
    uncut = None if cut is None else cut.uncut
    all_partial = cut is not None and len(cut.mask_mods) > 0 and uncut is None
    return make_lists(block_map.words, *sizes, all_partial, buffers, uncut)


def block_mask_of(
    lists: Lists,
    lengths: tuple[int, int],
    block_size: int,
    offset: Tensor | None,
    mask_mods: tuple[MaskMod, ...],
) -> BlockMask:
    """The BlockMask of what :func:`lists_of` and :func:`query_offset` give, causal per element.

    Args:
        lengths: of queries and of keys.
        mask_mods: further ones.
    """
    causal = causal_mask if offset is None else causal_mask_at(offset)
    return BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=block_size,
        mask_mod=and_masks(causal, *mask_mods) if mask_mods else causal,
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
    listed &= (indices >= 0) & (indices < columns)  # there are no other blocks
    # entries behind the count may hold anything: they go to a column that is cut off
    targets = torch.where(listed, indices, columns).to(torch.int64)
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, targets, True)[..., :-1]
