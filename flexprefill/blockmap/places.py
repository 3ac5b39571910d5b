"""Where the keys of requests lie in the pages of a cache, and index lists that name these places."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.blockmap.index_lists import Lists
from flexprefill.runtime.memory import IN_CHUNKS, room_for

ABSENT = 2**30  # behind every query; the sum with a key's place in its piece is an int32 too


class Places(NamedTuple):
    """Where a batch's keys lie in pages that stand one behind the other.

    Keys are counted in pieces: as many as one page and one key block have in common. Places are counted in pieces too.
    """

    size: int  # keys of a piece
    of_pieces: Tensor  # int32 [B, ceil(kv_len / size)], the place of each piece of the entry's keys
    starts: Tensor  # int32 [B, places], the position of a place's first key; ABSENT where it is no key of the entry


def find_places(block_table: Tensor, kv_len: int, page_size: int, pages: int, size: int) -> Places:
    """The places of a batch's keys.

    Args:
        block_table: int [B, ceil(kv_len / page_size) or more], the page of each ``page_size`` keys. A page stands once
            in a row.
        kv_len: Keys of each entry.
        page_size: Keys of a page, a multiple of ``size``.
        pages: How many there are.
        size: Keys of a piece.
    """
    a_page, count, device = page_size // size, ceil_div(kv_len, size), block_table.device
    used = block_table[:, : ceil_div(kv_len, page_size), None].long()
    of_pieces = (used * a_page + torch.arange(a_page, device=device)).flatten(1)[:, :count]
    starts = torch.full((block_table.shape[0], pages * a_page), ABSENT, dtype=torch.int32, device=device)
    positions = torch.arange(count, dtype=torch.int32, device=device) * size
    starts.scatter_(1, of_pieces, positions.expand(of_pieces.shape))
    return Places(size, of_pieces.to(torch.int32), starts)


def lists_in_places(lists: Lists, geometry: Geometry, places: Places) -> Lists:
    """Index lists of key blocks as lists of the places of their pieces.

    Args:
        lists: Of a map: partial counts, partial indices, full counts, full indices. Both lists ascend.
        geometry: The map's sizes.
        places: Of the keys. A block is one piece or several.

    Returns:
        The lists in the same order, [B, H, M, width]. The width is that of all pieces of the keys. On the CPU it is
        that of all places, because FlexAttention's kernel asks for it. Anything stands behind the last entry.
    """
    partial_counts, partial, full_counts, full = lists
    a_block = geometry.block_size // places.size
    count, columns = places.of_pieces.shape[1], geometry.columns
    padded = torch.nn.functional.pad(places.of_pieces, (0, columns * a_block - count))
    by_block = padded.unflatten(1, (columns, a_block))
    width = columns * a_block
    if not partial.is_cuda:
        width = max(width, places.starts.shape[1])
    needed = 2 * math.prod(partial_counts.shape) * width * partial.itemsize
    with room_for("the index lists of pages", needed, partial.device, IN_CHUNKS):
        renamed = [_renamed(indices, by_block, width) for indices in (partial, full)]
    last = partial.gather(3, (partial_counts.long()[..., None] - 1).clamp(min=0))[..., 0]
    # the last block may have fewer pieces; it is never whole, and the last of the partial list
    missing = columns * a_block - count
    short = (partial_counts > 0) & (last == columns - 1)
    return partial_counts * a_block - short.int() * missing, renamed[0], full_counts * a_block, renamed[1]


def _renamed(indices: Tensor, by_block: Tensor, width: int) -> Tensor:
    """[B, H, M, N] blocks as the places [B, N, pieces] of their pieces: int32 [B, H, M, width]."""
    batch, heads, rows, columns = indices.shape
    output = indices.new_zeros(batch, heads, rows, width)
    used = output[..., : columns * by_block.shape[2]].unflatten(3, (columns, by_block.shape[2]))
    for entry in range(batch):
        # by index_select, which takes int32
        own = by_block[entry].index_select(0, indices[entry].flatten())
        used[entry] = own.view(heads, rows, columns, -1)
    return output
