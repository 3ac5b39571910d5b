"""The last query blocks, which attend to all keys, split over their keys.

A kernel runs one program for each row of blocks, in order. The rows that keep everything are the longest and, in the
last head, start last: at length, the whole GPU waits for them. Computed on their own, in parts of their keys that are
merged by their log-sum-exps, they keep it busy.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import pad

from flexprefill.blockmap import BlockMap, ceil_div
from flexprefill.compiled import flex_over
from flexprefill.flex import lists_of, offsets_at, query_offset
from flexprefill.lists import ListBuffers, make_lists

TAIL_SPLIT_FROM = 16_384  # tokens (S_kv) from which splitting pays, by device times on an H200
MOST_PARTS = 8
WELL_USED = 0.9  # of the multiprocessors' time, while all programs take equally long


@functools.cache
def parts_for(programs: int, kernel: str, value_dim: int, device: torch.device) -> int:
    """Into how many parts to split the keys of rows that are ``programs`` programs as a whole.

    The fewest that leave few multiprocessors idle: every part is one more output to merge.
    """
    # so small, two of Triton's programs share a multiprocessor
    side_by_side = 2 if kernel == "triton" and value_dim <= 64 else 1
    places = side_by_side * torch.cuda.get_device_properties(device).multi_processor_count

    def used(parts: int) -> float:
        return programs * parts / (ceil_div(programs * parts, places) * places)

    choices = range(2, MOST_PARTS + 1)
    return next((parts for parts in choices if used(parts) >= WELL_USED), max(choices, key=used))


def flex_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    rows: int,
    parts: int,
    lse_factor: float,
    return_aux: AuxRequest | None,
    buffers: ListBuffers | None = None,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Any]:
    """As :func:`flex_over` without mods, the last query blocks on their own and split over their keys.

    Args:
        rows: how many query blocks are split; fewer than there are.
        parts: of equally many key blocks, each more than ``rows + 1``: the first has all that the causal edge crosses.
        lse_factor: what the kernel's log-sum-exp has to be multiplied with; what is returned has to be as well.
        return_aux: asks for the log-sum-exp at most.
        arguments: further ones of flex_over.
    """
    from flexprefill import tail_kernel  # imports triton

    words, block, columns = block_map.words, block_map.block_size, block_map.shape[3]
    first = block_map.shape[2] - rows
    length = query.shape[2] - first * block
    arguments = {**arguments, "block_size": block}
    others = lists_of(replace(block_map, words=pad(words[:, :, :first], (0, 0, 0, rows))), None, buffers)
    offset = query_offset(block_map)
    result = flex_over(query, key, value, others, offset, return_aux=return_aux, **arguments)
    output, aux = (result, None) if return_aux is None else result

    tail = query[:, :, first * block :]
    if length < rows * block:  # filled up, so that every part starts on a block's edge
        tail = pad(tail, (0, 0, 0, rows * block - length))
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(query):
        by_part = tail_kernel.part_words(words, first, columns, parts)
    lists = make_lists(by_part, length, block_map.kv_len, block, False, None)
    outputs, part_aux = flex_over(
        tail.repeat(1, 1, parts, 1),
        key,
        value,
        tuple(tensor.unflatten(1, (-1, parts)).flatten(2, 3) for tensor in lists),
        offsets_at(block_map, block_map.offset + first * block),
        return_aux=AuxRequest(lse=True),
        **arguments,
    )
    lse = None if aux is None else aux.lse
    with torch.cuda.device_of(query):
        tail_kernel.merge_parts(outputs, part_aux.lse, parts, lse_factor, output, lse, length)
    return result
