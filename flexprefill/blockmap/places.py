"""Where the keys of requests lie in the pages of a cache, and index lists that name these places.

Pages are those of PagedAttention (arXiv 2309.06180). attention-gym's PagedAttention showed that FlexAttention reads
them through its lists of blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.blockmap.index_lists import ListBuffers, Lists, make_lists

ABSENT = 2**30  # behind every query


class Places(NamedTuple):
    """Where a batch's keys lie in pages that stand one behind the other.

    Keys are counted in pieces: as many as one page and one key block have in common. Places are counted in pieces too.
    """

    size: int  # keys of a piece
    of_pieces: Tensor  # int32 [B, ceil(kv_len / size)], the place of each piece of the entry's keys
    positions: Tensor  # int32 [B, places · size], of the key in each slot; ABSENT where it is no key of the entry


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
    positions = torch.full((block_table.shape[0], pages * a_page, size), ABSENT, dtype=torch.int32, device=device)
    inside = torch.arange(count * size, dtype=torch.int32, device=device).unflatten(0, (count, size))
    positions.scatter_(1, of_pieces[..., None].expand(-1, -1, size), inside.expand(*of_pieces.shape, size))
    return Places(size, of_pieces.to(torch.int32), positions.flatten(1))


def names_of(places: Places, geometry: Geometry) -> Tensor:
    """What index lists call the pieces of blocks: their places, int32 [B, N · pieces]; -1 for a piece without keys."""
    a_block = geometry.block_size // places.size
    missing = geometry.columns * a_block - places.of_pieces.shape[1]
    return pad(places.of_pieces, (0, missing), value=-1)


def lists_in_places(words: Tensor, geometry: Geometry, places: Places, buffers: ListBuffers | None = None) -> Lists:
    """A map's blocks as lists of the places of their pieces; see index_lists.

    On the CPU they are as wide as there are places, because FlexAttention's kernel asks for it.
    """
    partial_counts, partial, full_counts, full = make_lists(words, geometry, buffers, names=names_of(places, geometry))
    missing = places.positions.shape[1] // places.size - partial.shape[3]
    if words.is_cuda or missing <= 0:
        return partial_counts, partial, full_counts, full
    return partial_counts, pad(partial, (0, missing)), full_counts, pad(full, (0, missing))
