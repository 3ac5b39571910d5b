"""A map's bits as the index lists that FlexAttention reads. One custom operator, in PyTorch and in Triton."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div, full_blocks
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.runtime.operators import operator
from flexprefill.runtime.replaying import LONG, layouts_of, replayed
from flexprefill.runtime.tracing import is_tracing

CPU_BYTES_A_BLOCK = 22  # at the peak of the process's memory

Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # partial counts, partial indices, full counts, full indices


def as_lists(tensors: Sequence[Tensor]) -> Lists:
    """Four tensors as lists."""
    partial_counts, partial, full_counts, full = tensors
    return partial_counts, partial, full_counts, full


class Listing(NamedTuple):
    """What is listed of a map's blocks, and how; see index_lists."""

    all_partial: bool = False
    uncut: Tensor | None = None
    names: Tensor | None = None


class ListBuffers:
    """Memory for the index lists of one BlockMask at a time. The next BlockMask of the same shape uses it again.

    At 256K tokens and 32 heads the lists take 1 GiB. Most of it is zeros behind the entries. With buffers the layers of
    a model share that memory. Then only the entries of the last mask are cleared, not all of the memory.

    A BlockMask made with buffers is overwritten by the next one that is made with them in the same thread on the same
    stream. Use it before you make another. Each thread and each stream has memory of its own. Memory is allocated at
    the first use and whenever the shape changes.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int | None], Lists] = {}  # by thread and stream

    @property
    def nbytes(self) -> int:
        """Bytes held, for all threads and streams."""
        return sum(tensor.nbytes for lists in tuple(self._held.values()) for tensor in lists)

    def lists_of(self, words: Tensor, columns: int) -> Lists:
        """This thread's and stream's lists for words [B, H, M, W] and so many entries of a row."""
        stream = torch.cuda.current_stream(words.device).cuda_stream if words.is_cuda else None
        place = threading.get_ident(), stream
        held = self._held.get(place)
        if held is None or held[1].shape != (*words.shape[:3], columns) or held[1].device != words.device:
            held = None  # freed before the new ones are made: both may not fit
            # an executor keeps its threads' objects, so whoever allocates next gives their memory back
            alive = {thread.ident for thread in threading.enumerate()}
            for other in tuple(self._held):
                if other == place or other[0] not in alive:
                    self._held.pop(other, None)
            # memory made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                held = self._held[place] = _allocate(words.new_zeros, words, columns)
        return held


def make_lists(
    words: Tensor,
    geometry: Geometry,
    buffers: ListBuffers | None = None,
    *,
    all_partial: bool = False,
    uncut: Tensor | None = None,
    names: Tensor | None = None,
) -> Lists:
    """As `index_lists`, in the memory of buffers if there are any."""
    if buffers is None:
        return index_lists(words, *geometry, all_partial, uncut, names)
    if not isinstance(buffers, ListBuffers):
        raise TypeError(f"buffers must be a ListBuffers, got {type(buffers).__name__}")
    if is_tracing():
        raise ValueError("buffers cannot be used inside torch.compile, which plans memory itself: pass None there")
    lists = buffers.lists_of(words, geometry.columns if names is None else names.shape[1])
    _fill(lists, words, geometry, Listing(all_partial, uncut, names), reused=True)
    return lists


@operator("flexprefill::index_lists")
def index_lists(
    words: Tensor, q_len: int, kv_len: int, block_size: int, all_partial: bool, uncut: Tensor | None = None,
    names: Tensor | None = None,
) -> Lists:  # fmt: skip
    """The ascending lists of partial and of full blocks. Zeros stand behind the last entry.

    Args:
        words: A BlockMap's, int32 [B, H, M, ceil(N / 32)].
        q_len: The map's, as are ``kv_len`` and ``block_size``.
        all_partial: Puts every block into the partial list, not only those that the causal edge crosses.
        uncut: Only blocks whose bit is set here can be full. int32 of a shape that expands to that of words. None: any
            block can be.
        names: What stands in the lists in place of blocks: int32 [B, N · pieces], contiguous, so many names for each
            block. A piece of the last block that holds no key has a negative name, and is not listed. None: the blocks'
            own indices.

    Returns:
        Partial counts [B, H, M], partial indices [B, H, M, N or N · pieces], full counts, full indices. All int32 and
        contiguous.
    """
    geometry, listing = Geometry(q_len, kv_len, block_size), Listing(all_partial, uncut, names)
    if words.is_cuda and uncut is None and names is None and kv_len < LONG:
        kind = "lists", geometry, all_partial, layouts_of(words)
        return as_lists(replayed(kind, lambda own: new_lists(own, geometry, listing), words))
    return new_lists(words, geometry, listing)


def new_lists(words: Tensor, geometry: Geometry, listing: Listing) -> Lists:
    """As `index_lists`, not as an operator."""
    lists = _allocate(words.new_empty, words, geometry.columns if listing.names is None else listing.names.shape[1])
    _fill(lists, words, geometry, listing, reused=False)
    return lists


def _allocate(new: Callable[..., Tensor], words: Tensor, columns: int) -> Lists:
    """Memory for the lists of words [B, H, M, W]."""
    counts = words.shape[:3]
    indices = (*counts, columns)
    needed = math.prod(indices) * (8 if words.is_cuda else CPU_BYTES_A_BLOCK)
    with room_for("the index lists", needed, words.device, f"share a ListBuffers between layers, or {IN_CHUNKS}"):
        return new(counts), new(indices), new(counts), new(indices)


def _fill(lists: Lists, words: Tensor, geometry: Geometry, listing: Listing, *, reused: bool) -> None:
    if words.is_cuda:
        from flexprefill.blockmap import index_lists_kernel  # imports triton

        # Triton launches on the current device, and the words may be on another
        with torch.cuda.device_of(words):
            index_lists_kernel.fill_lists(lists, words, geometry, *listing, reused=reused)
        return
    all_partial, uncut, names = listing
    columns = geometry.columns
    # a map's words have no bits in the causal future; if other words do, these are left out
    kept = unpack_bits(words, columns) & causal_blocks(geometry, words.device)
    J = torch.arange(columns, device=words.device, dtype=torch.int32)
    whole = J < full_blocks(geometry, words.device)[:, None]
    if all_partial:
        whole = torch.zeros_like(whole)
    if uncut is not None:
        whole = whole & unpack_bits(uncut, columns)
    if names is not None:
        pieces = names.shape[1] // columns
        kept = kept.repeat_interleave(pieces, -1) & (names >= 0)[:, None, None]
        whole = whole.repeat_interleave(pieces, -1)
    filled = *_to_list(kept & ~whole, names), *_to_list(kept & whole, names)
    for target, tensor in zip(lists, filled, strict=True):
        target.copy_(tensor)


def _to_list(selected: Tensor, names: Tensor | None) -> tuple[Tensor, Tensor]:
    counts = selected.sum(-1, dtype=torch.int32)
    past_the_end = selected.shape[-1]
    J = torch.arange(past_the_end, device=selected.device, dtype=torch.int32)
    indices = torch.where(selected, J, past_the_end).sort(-1).values
    behind = indices == past_the_end
    indices = indices.masked_fill_(behind, 0)
    if names is not None:
        renamed = names[:, None, None].expand(*indices.shape[:3], -1).gather(-1, indices.long())
        indices = renamed.masked_fill_(behind, 0)
    return counts, indices


@torch.library.register_fake("flexprefill::index_lists")
def _(words, q_len, kv_len, block_size, all_partial, uncut=None, names=None):
    width = ceil_div(kv_len, block_size) if names is None else names.shape[1]
    counts, indices = words.shape[:3], (*words.shape[:3], width)
    return tuple(map(words.new_empty, (counts, indices, counts, indices)))
