"""The last query blocks, which attend to all keys, split over their keys.

A kernel runs one program for each row of blocks, in order. The rows that keep everything are the longest, and those of
the last head start last. In a long prompt the whole GPU waits for them. Here these rows are computed on their own, in
parts of their keys, which keeps the GPU busy. The parts are merged by their log-sum-exps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import pad

from flexprefill.attention.flex import FlexResult, FlexSettings, flex_over
from flexprefill.blockmap.block_mask import Cut, ListedBlocks, list_blocks, offsets_at
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.index_lists import ListBuffers, make_lists
from flexprefill.blockmap.map import BlockMap
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
    parts: int  # of equally many key blocks, each more than rows + 1: the first holds the whole causal edge
    lse_factor: float  # corrects the kernel's log-sum-exp; the one that is returned is not corrected


def flex_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    split: Split,
    settings: FlexSettings,
    buffers: ListBuffers | None = None,
) -> FlexResult:
    """As flex_over without mods. The last query blocks are computed on their own, split over their keys.

    Args:
        settings: ``return_aux`` asks for the log-sum-exp at most.
    """
    from flexprefill.attention import tail_kernel  # imports triton

    rows, parts, _ = split
    words, geometry, block = block_map.words, block_map.geometry, block_map.block_size
    first = geometry.rows - rows
    length = geometry.q_len - first * block
    others = list_blocks(pad(words[:, :, :first], (0, 0, 0, rows)), geometry, Cut(), buffers)
    output, aux = flex_over(query, key, value, others, settings)

    tail = query[:, :, first * block :]
    if length < rows * block:  # padded, so that every part starts on a block's edge
        tail = pad(tail, (0, 0, 0, rows * block - length))
    # Triton launches on the current device, and the tensors may be on another
    with torch.cuda.device_of(query):
        by_part = tail_kernel.part_words(words, first, geometry.columns, parts)
    lists = make_lists(by_part, geometry._replace(q_len=length))
    counts, partial, full_counts, full = (tensor.unflatten(1, (-1, parts)).flatten(2, 3) for tensor in lists)
    listed = ListedBlocks((counts, partial, full_counts, full), offsets_at(words, geometry.offset + first * block))
    of_parts = settings._replace(return_aux=AuxRequest(lse=True))
    outputs, part_aux = flex_over(tail.repeat(1, 1, parts, 1), key, value, listed, of_parts)
    assert part_aux.lse is not None  # asked for
    with torch.cuda.device_of(query):
        tail_kernel.merge_parts(outputs, part_aux.lse, parts, split.lse_factor, output, aux.lse, length)
    return output, aux
