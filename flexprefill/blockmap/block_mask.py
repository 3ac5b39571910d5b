"""A map's words as FlexAttention's BlockMask and back, with the mask_mods that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.index_lists import ListBuffers, Lists, make_lists
from flexprefill.blockmap.masking import MASK_MOD_ARGUMENTS, MaskedBlocks, MaskMod, check_mod
from flexprefill.blockmap.places import Places, lists_in_places
from flexprefill.runtime.operators import to_capture


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """mask_mod of a whole prompt: a query sees its own position and those before it."""
    return q_idx >= kv_idx


def causal_mask_at(offset: Tensor) -> MaskMod:
    """mask_mod of queries that stand at ``offset`` among the keys: int32 [B], one for each batch entry.

    The offset is a tensor because a mask_mod that closes over an int is compiled anew for each value. It has a
    dimension because FlashAttention-4 reads captured tensors only by an index.
    """

    def causal_mask_at_offset(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + offset[b] >= kv_idx

    return causal_mask_at_offset


def causal_mask_in_places(offset: Tensor, positions: Tensor) -> MaskMod:
    """mask_mod of queries over keys in the pages of a cache: a query sees the keys of its own batch entry up to itself.

    A position for each piece of a page would take less memory. Triton's kernel then keeps 336 bytes of a thread outside
    its registers, and takes 1.3 times as long.

    Args:
        offset: As in `causal_mask_at`.
        positions: That of the key in each slot of all pages, int32 [B, slots].
    """

    def causal_mask_in_pages(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + offset[b] >= positions[b, kv_idx]

    return causal_mask_in_pages


def offsets_at(words: Tensor, position: int) -> Tensor:
    """The ``offset`` of `causal_mask_at` for queries of a map's batch that start at a position."""
    # filled on the device, because a copy from the host would wait and cannot be captured
    return to_capture(torch.full((words.shape[0],), position, dtype=torch.int32, device=words.device))


class Mask(NamedTuple):
    """What hides elements besides the causal edge."""

    mod: MaskMod
    blocks: MaskedBlocks | None  # what it leaves of each block; None if that is not known


class Cut(NamedTuple):
    """What masks do inside a map's kept blocks."""

    mask_mods: tuple[MaskMod, ...] = ()
    uncut: Tensor | None = None  # words of the blocks that they leave whole; None if any block may be cut


UNCUT = Cut()


class ListedBlocks(NamedTuple):
    """A map as an attention kernel reads it: its index lists, and what hides elements in the partial blocks."""

    lists: Lists
    offset: Tensor | None  # of causal_mask_at; None for a whole prompt, because causal_mask needs none
    mask_mods: tuple[MaskMod, ...] = ()  # besides the causal one
    positions: Tensor | None = None  # of causal_mask_in_places, if the keys lie in pages; the lists then name places


def masks_of(mask_mod: MaskMod | BlockMask | None, words: Tensor, geometry: Geometry) -> tuple[Mask, ...]:
    """A caller's mask_mod or BlockMask as masks of a map. Nothing is known of the blocks of a mask_mod.

    Raises:
        TypeError: It is neither.
        ValueError: The BlockMask has other lengths, heads, batch, block size or device than the map.
    """
    if isinstance(mask_mod, BlockMask):
        return (Mask(mask_mod.mask_mod, blocks_of_mask(mask_mod, words, geometry)),)
    check_mod("mask_mod", mask_mod, MASK_MOD_ARGUMENTS)
    return () if mask_mod is None else (Mask(mask_mod, None),)


def cut_by(words: Tensor, masks: Sequence[Mask]) -> tuple[Tensor, Cut]:
    """A map's words without the blocks that masks are known to empty, and what masks do inside the others."""
    known = [mask.blocks for mask in masks if mask.blocks is not None]
    uncut = None
    for blocks in known:
        words = words & blocks.left
        uncut = blocks.whole if uncut is None else uncut & blocks.whole
    return words, Cut(tuple(mask.mod for mask in masks), uncut if len(known) == len(masks) else None)


def list_blocks(
    words: Tensor,
    geometry: Geometry,
    cut: Cut = UNCUT,
    buffers: ListBuffers | None = None,
    places: Places | None = None,
) -> ListedBlocks:
    """The index lists of a map whose blocks masks may cut; see index_lists. Blocks that lie in places are not cut."""
    if places is not None:
        lists = lists_in_places(words, geometry, places, buffers)
        return ListedBlocks(lists, offsets_at(words, geometry.offset), (), places.positions)
    all_partial = len(cut.mask_mods) > 0 and cut.uncut is None
    lists = make_lists(words, geometry, buffers, all_partial=all_partial, uncut=cut.uncut)
    offset = None if geometry.offset == 0 else offsets_at(words, geometry.offset)
    return ListedBlocks(lists, offset, cut.mask_mods)


def block_mask_of(listed: ListedBlocks, geometry: Geometry, piece: int | None = None) -> BlockMask:
    """The BlockMask of listed blocks, causal for each element.

    Args:
        listed: The blocks.
        geometry: The map's sizes. For keys in pages ``kv_len`` is that of all pages.
        piece: Keys of a piece, if the keys lie in pages.
    """
    lists, offset, mask_mods, positions = listed
    size = geometry.block_size
    causal = causal_mask if offset is None else causal_mask_at(offset)
    if offset is not None and positions is not None:
        causal = causal_mask_in_places(offset, positions)
    return BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=size if piece is None else (size, piece),
        mask_mod=and_masks(causal, *mask_mods) if mask_mods else causal,
        seq_lengths=(geometry.q_len, geometry.kv_len),
        compute_q_blocks=False,
    )


def blocks_of_mask(block_mask: BlockMask, words: Tensor, geometry: Geometry) -> MaskedBlocks:
    """What a BlockMask leaves of a map's blocks.

    Raises:
        ValueError: It has other lengths, heads, batch, block size or device than the map.
    """
    size, (batch, heads, rows), counts = geometry.block_size, words.shape[:3], block_mask.kv_num_blocks
    for name, theirs, ours in (
        ("BLOCK_SIZE", block_mask.BLOCK_SIZE, (size, size)),
        ("seq_lengths", block_mask.seq_lengths, (geometry.q_len, geometry.kv_len)),
        ("device", counts.device, words.device),
        ("rows of blocks", counts.shape[-1], rows),
    ):
        if theirs != ours:
            raise ValueError(f"block_mask must have the map's {name} {ours}, got {theirs}")
    if counts.dim() != 3 or counts.shape[0] not in (1, batch) or counts.shape[1] not in (1, heads):
        raise ValueError(
            f"block_mask must be of batch 1 or {batch} and heads 1 or {heads}, got {list(counts.shape[:-1])}"
        )
    return MaskedBlocks(*map(pack_bits, _visited(block_mask, geometry.columns)))


def read_block_mask(block_mask: BlockMask) -> tuple[Tensor, Geometry]:
    """The blocks that a BlockMask visits, bool [B, H, M, N], and its sizes; see BlockMap.from_block_mask."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}")
    if block_mask.BLOCK_SIZE[0] != block_mask.BLOCK_SIZE[1]:
        raise ValueError(f"block_mask must have square blocks, got BLOCK_SIZE={block_mask.BLOCK_SIZE}")
    geometry = Geometry(*block_mask.seq_lengths, block_mask.BLOCK_SIZE[0])
    if geometry.q_len > geometry.kv_len:
        raise ValueError(
            f"block_mask must have no more queries than keys, got seq_lengths={(geometry.q_len, geometry.kv_len)}"
        )
    if block_mask.kv_num_blocks.dim() != 3 or block_mask.kv_num_blocks.shape[2] != geometry.rows:
        raise ValueError(
            f"block_mask must list {geometry.rows} rows of blocks [B, H, rows] for q_len={geometry.q_len}, "
            f"got {list(block_mask.kv_num_blocks.shape)}: a slice of rows has no place among the keys"
        )
    return _visited(block_mask, geometry.columns)[0], geometry


def _visited(block_mask: BlockMask, columns: int) -> tuple[Tensor, Tensor]:
    """The blocks that a BlockMask visits, and of these the full ones: bool [B, H, M, N] both."""
    visited = _to_dense(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    full = torch.zeros_like(visited) if counts is None or indices is None else _to_dense(counts, indices, columns)
    return visited | full, full


def _to_dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    listed &= (indices >= 0) & (indices < columns)  # there are no other blocks
    # entries behind the count may hold anything, so they go to a column that is cut off
    targets = torch.where(listed, indices, columns).to(torch.int64)
    dense = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, targets, True)[..., :-1]
