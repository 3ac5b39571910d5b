"""What compiled attention knows of its inputs' strides.

torch.compile makes a symbol of each stride that is no product of sizes. Views of a fused projection and of a cache have
such strides. Triton then cannot tell that rows are aligned, loads them in small pieces, and takes twice as long. So
these strides are stated anew inside the graph: rows by a constant, batch and heads by multiples of `UNIT`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.runtime.compiling import keep_size, sizes_may_change
from flexprefill.runtime.state import remembered

UNIT = 16  # Triton's widest loads need strides that are known to be multiples of it
NO_RULERS = None, None, None  # for query, key and value
SPARE = 2  # torch.compile makes constants of sizes 0 and 1


@remembered("layouts of strides", most=4096)
def layout_of(strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    """The dimensions ordered by their strides, which strides are 0, and the stride of rows."""
    return tuple(sorted(range(4), key=strides.__getitem__)), tuple(stride == 0 for stride in strides), strides[2]


def ruler_for(tensor: Tensor, place: int, state: tuple[object, ...]) -> Tensor | None:
    """A tensor whose sizes say the strides of batch, heads and rows, for `stated`.

    None where sizes give all strides already, or where a stride is no multiple of `UNIT`.

    Args:
        tensor: [B, H, S, D], with a last stride of 1.
        place: Which input of the graph it is. A graph whose inputs share a ruler would be compiled for that.
        state: What ``what_graphs_guard`` gives.
    """
    sizes, strides = tensor.shape, tensor.stride()
    expected = 1
    for dim in sorted(range(4), key=lambda dim: (strides[dim], sizes[dim])):
        if strides[dim] != expected:
            break
        expected *= sizes[dim]
    else:
        return None
    if any(stride % UNIT for stride in strides[:3]):
        return None
    return _ruler(strides[0] // UNIT, strides[1] // UNIT, strides[2], place, state)


@remembered("rulers of strides", most=1024)
def _ruler(batch: int, head: int, row: int, place: int, state: tuple[object, ...]) -> Tensor:
    """A ruler of so many units for batch and heads, made in the ``state`` of the thread that uses it. One byte."""
    ruler = torch.empty((), dtype=torch.uint8, device="cpu").expand(batch + SPARE, head + SPARE, row)
    sizes_may_change(ruler, 0, 1)
    keep_size(ruler, 2)
    return ruler


def stated(tensor: Tensor, ruler: Tensor | None) -> Tensor:
    """The same tensor in a graph that knows its strides."""
    if ruler is None:
        return tensor
    batch, head, row = ruler.shape
    return tensor.as_strided(tensor.shape, (UNIT * (batch - SPARE), UNIT * (head - SPARE), row, 1))
