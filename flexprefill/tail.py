"""The last query blocks, which attend to all keys, split over their keys.

A kernel runs one program for each row of blocks, in order. The rows that keep everything are the longest and, in the
last head, start last: at length, the whole GPU waits for them. Computed on their own, in parts of their keys that are
merged by their log-sum-exps, they keep it busy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import pad

from flexprefill.blockmap import BlockMap, ceil_div
from flexprefill.compiled import flex_over
from flexprefill.flex import Lists, lists_of, offsets_at, query_offset
from flexprefill.lists import ListBuffers

# tokens (S_kv) from which splitting pays, measured on an H200
TAIL_SPLIT_FROM = {"triton": 8_192, "flash": 16_384}
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
        parts: of about equally many kept blocks, for rows that keep them all.
        lse_factor: what the kernel's log-sum-exp has to be multiplied with; what is returned has to be as well.
        return_aux: asks for the log-sum-exp at most.
        arguments: further ones of flex_over.
    """
    block = block_map.block_size
    first = block_map.shape[2] - rows
    lists = lists_of(block_map, None, buffers)
    arguments = {**arguments, "block_size": block}

    others = _without_last(lists, first), query_offset(block_map)
    result = flex_over(query, key, value, *others, return_aux=return_aux, **arguments)
    output, result_aux = (result, None) if return_aux is None else result

    tail = query[:, :, first * block :]
    length = tail.shape[2]
    # a short last block is filled up, so that every part starts on a block's edge
    repeated = pad(tail, (0, 0, 0, rows * block - length)).repeat(1, 1, parts, 1)
    offset = offsets_at(block_map, block_map.offset + first * block)
    outputs, aux = flex_over(
        repeated,
        key,
        value,
        _parts_of_last(lists, first, parts),
        offset,
        return_aux=AuxRequest(lse=True),
        **arguments,
    )
    sums = lse_factor * aux.lse.unflatten(2, (parts, -1))[..., :length]  # [B, Hq, parts, length]
    # a row that keeps nothing is zero, as from the kernels
    weights = torch.softmax(sums, 2).nan_to_num(0).unsqueeze(-1)
    merged = (outputs.unflatten(2, (parts, -1))[:, :, :, :length] * weights).sum(2)
    output[:, :, first * block :] = merged
    if result_aux is not None and result_aux.lse is not None:
        result_aux.lse[:, :, first * block :] = sums.logsumexp(2) / lse_factor
    return result


def _without_last(lists: Lists, first: int) -> Lists:
    """The lists with rows from ``first`` on empty; the counts are new, because ListBuffers still reads its own."""
    partial_num, partial, full_num, full = lists
    rest = partial_num.shape[2] - first
    return pad(partial_num[:, :, :first], (0, rest)), partial, pad(full_num[:, :, :first], (0, rest)), full


def _parts_of_last(lists: Lists, first: int, parts: int) -> Lists:
    """The lists of rows from ``first`` on, once for each part: its share of the full blocks, and for the first part
    the partial ones. [B, Hq, parts * rows (, width)], part by part."""
    partial_num, partial, full_num, full = (tensor[:, :, first:] for tensor in lists)
    rows, columns = full.shape[2:]
    width = max(ceil_div(columns, parts), 2)  # a row has up to two partial blocks
    starts = width * torch.arange(parts, device=full.device, dtype=torch.int32)[:, None]
    part_num = (full_num.unsqueeze(2) - starts).clamp(0, width)  # [B, Hq, parts, rows]
    part = pad(full, (0, parts * width - columns)).unflatten(3, (parts, width)).transpose(2, 3)
    others = (parts - 1) * rows
    return (
        pad(partial_num, (0, others)),
        pad(partial[..., :width], (0, 0, 0, others)),
        part_num.flatten(2, 3),
        part.flatten(2, 3).contiguous(),
    )
