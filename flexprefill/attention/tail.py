"""The last query blocks, which attend to all keys, split over their keys.

A kernel runs one program for each row of blocks, in order. The rows that keep everything are the longest, and those of
the last head start last. In a long prompt the whole GPU waits for them. Here these rows are computed on their own, in
parts of their keys, which keeps the GPU busy. The parts are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.attention.flex import FlexResult
from flexprefill.blockmap.block_mask import UNCUT, ListedBlocks, list_blocks, offsets_at
from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.blockmap.index_lists import ListBuffers, Lists
from flexprefill.blockmap.map import BlockMap
from flexprefill.blockmap.places import Places
from flexprefill.runtime.state import remembered

TAIL_SPLIT_FROM = 16_384  # tokens (S_kv) from which splitting pays, by device times on an H200
MOST_PARTS = 8
WELL_USED = 0.9  # of the multiprocessors' time, if all programs take equally long


@remembered("parts of the last rows", most=1024)
def parts_for(programs: int, kernel: str, value_dim: int, device: torch.device) -> int:
    """Into how many parts to split the keys of the last rows, which are ``programs`` programs when whole.

    It is the smallest number that leaves few multiprocessors idle, because every part is one more output to merge.
    """
    # two of Triton's programs of this size share a multiprocessor
    side_by_side = 2 if kernel == "triton" and value_dim <= 64 else 1
    places = side_by_side * torch.cuda.get_device_properties(device).multi_processor_count

    def used(parts: int) -> float:
        return programs * parts / (ceil_div(programs * parts, places) * places)

    choices = range(2, MOST_PARTS + 1)
    return next((parts for parts in choices if used(parts) >= WELL_USED), max(choices, key=used))


class Split(NamedTuple):
    """How the last rows are split."""

    rows: int  # query blocks that are split; fewer than all
    parts: int  # two or more, of equally many key blocks, each more than rows + 1: the last holds the whole causal edge

    def first(self, geometry: Geometry) -> int:
        """The first of the query blocks."""
        return geometry.rows - self.rows

    def of_rows(self, geometry: Geometry) -> Geometry:
        """The geometry of the last rows alone."""
        return geometry._replace(q_len=geometry.q_len - self.first(geometry) * geometry.block_size)

    def of_parts(self, geometry: Geometry) -> Geometry:
        """The geometry of their attention: a part begins on a block's edge, and the last one ends where queries do."""
        before = (self.parts - 1) * self.rows * geometry.block_size
        return geometry._replace(q_len=before + self.of_rows(geometry).q_len)


def words_in_parts(words: Tensor, geometry: Geometry, split: Split) -> tuple[Tensor, Tensor]:
    """A map's words without the last rows, and those of the last rows by part; see tail_kernel.split_words."""
    from flexprefill.attention import tail_kernel  # imports triton

    # Triton launches on the current device, and the tensors may be on another
    with torch.cuda.device_of(words):
        return tail_kernel.split_words(words, split.first(geometry), geometry.columns, split.parts)


def lists_in_parts(
    block_map: BlockMap, split: Split, buffers: ListBuffers | None = None, places: Places | None = None
) -> tuple[ListedBlocks, ListedBlocks]:
    """What `attend_in_parts` takes of a map: the lists of the other rows, and those of the last rows by part.

    Args:
        block_map: The kept blocks.
        split: How to split.
        buffers: Memory for the lists of the other rows.
        places: Where the keys lie, if they lie in pages.
    """
    words, geometry = block_map.words, block_map.geometry
    others, by_part = words_in_parts(words, geometry, split)
    of_rows = list_blocks(by_part, split.of_rows(geometry), places=places)
    offset = offsets_at(words, split.of_parts(geometry).offset)
    of_parts = of_rows._replace(lists=in_one_row(of_rows.lists, split), offset=offset)
    return list_blocks(others, geometry, UNCUT, buffers, places), of_parts


def in_one_row(lists: Lists, split: Split) -> Lists:
    """Lists of [B, H · parts, rows] as lists of [B, H, parts · rows]."""
    counts, partial, full_counts, full = lists
    rows = counts.shape[0], counts.shape[1] // split.parts, split.parts * split.rows
    return counts.view(rows), partial.view(*rows, -1), full_counts.view(rows), full.view(*rows, -1)


# Attention of queries over listed blocks, and whether it has to return log-sum-exps. Causal attention gets queries at
# the last positions, as their number tells.
Attend = Callable[[Tensor, ListedBlocks, bool], FlexResult]


def attend_in_parts(
    attend: Attend, query: Tensor, geometry: Geometry, split: Split, others: ListedBlocks, of_parts: ListedBlocks
) -> FlexResult:
    """Attention without mods. The last query blocks are computed apart, split over their keys, and merged.

    Args:
        attend: Computes attention over any lists, for the call's keys. Without being told to, it returns the
            log-sum-exps that the call asks for.
        query: The call's.
        geometry: The call's.
        split: How to split.
        others: `lists_in_parts`'.
        of_parts: Likewise.
    """
    from flexprefill.attention import tail_kernel  # imports triton

    output, aux = attend(query, others, False)
    length = split.of_rows(geometry).q_len
    tail, missing = query[:, :, query.shape[2] - length :], split.rows * geometry.block_size - length
    gap = [tail.new_zeros(*tail.shape[:2], missing, tail.shape[3])] if missing else []
    outputs, part_aux = attend(torch.cat([*[tail, *gap] * (split.parts - 1), tail], 2), of_parts, True)
    assert part_aux.lse is not None  # asked for
    with torch.cuda.device_of(query):
        tail_kernel.merge_parts(outputs, part_aux.lse, split.parts, output, aux.lse, length)
    return output, aux
