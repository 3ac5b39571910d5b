"""The vectors of each block that lie farthest from its mean, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.runtime.devices import multiprocessors
from flexprefill.runtime.launching import launch

BLOCKS = 4  # of a program, at most: it finds the largest distances of all at once
PROGRAMS = 3  # a multiprocessor: so many blocks fit into its registers
PROGRAMS_A_PLACE = 8  # one after the other, so that all places end together
BYTES_OF_WARP = 2**13  # of a block, in registers


@triton.jit(do_not_specialize=["length", "blocks", "first_blocks", "each"])
def farthest_kernel(
    tensor_ptr, found_ptr, stride_b, stride_h, stride_s, stride_d, length, blocks, first_blocks, each, HEADS,
    COUNT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """``each`` blocks of [B, HEADS, S, D], MOST at most. It does not look behind the first ``first_blocks``.

    Writes indices, int32 [B, HEADS, blocks, COUNT], as two_sided.farthest gives them. With VECTORS it writes the
    vectors themselves, [B, HEADS, blocks, COUNT, D].
    """
    first = tl.program_id(0) * each
    head = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    m = tl.arange(0, MOST)
    base = tensor_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
    distances = tl.zeros([MOST, BLOCK], tl.float32)
    for own in tl.range(0, tl.minimum(each, first_blocks - first), num_stages=1):
        row = (first + own) * BLOCK + s
        size = tl.minimum(length - (first + own) * BLOCK, BLOCK)
        offsets = row.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
        vectors = tl.load(base + offsets, mask=(row[:, None] < length) & (d[None, :] < D), other=0.0).to(tl.float32)
        difference = vectors - (tl.sum(vectors, 0) / size.to(tl.float32))[None, :]
        distance = tl.sum(difference * difference, 1)
        distances = tl.where(m[:, None] == own, distance[None, :], distances)
    block = first + m
    size = tl.maximum(tl.minimum(length - block * BLOCK, BLOCK), 1)
    # distances are not negative, so their bits are in their order; what is not a number stands first
    bits = tl.where(distances == distances, distances.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    # of as far ones the first is the largest, so a single maximum finds distance and index
    order = tl.where(s[None, :] < size[:, None], bits, -1).to(tl.int64) * BLOCK + (BLOCK - 1 - s)[None, :]
    left = order
    for i in tl.static_range(COUNT):
        # a block of fewer vectors names them again
        left = tl.where((i % size == 0)[:, None], order, left)
        largest = tl.max(left, 1)
        left = tl.where(left == largest[:, None], -BLOCK, left)
        index = BLOCK - 1 - (largest % BLOCK).to(tl.int32)
        inside = (m < each) & (block < first_blocks)
        found = found_ptr + ((head * blocks + block) * COUNT + i) * (D if VECTORS else 1)
        if VECTORS:
            places = base + (block * BLOCK + index).to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
            wanted = inside[:, None] & (d[None, :] < D)
            tl.store(found[:, None] + d[None, :], tl.load(places, mask=wanted, other=0.0), mask=wanted)
        else:
            tl.store(found, index, mask=inside)


def farthest(
    tensor: Tensor, block_size: int, count: int, vectors: bool = False, first_blocks: int | None = None
) -> Tensor:
    """As two_sided.farthest. With ``vectors`` the vectors themselves, [B, H, blocks, count, D] in tensor's dtype.

    Only those of the first ``first_blocks`` are found, if that is given. The others are not to be read.
    """
    batch, heads, length, head_dim = tensor.shape
    blocks = ceil_div(length, block_size)
    shape = batch, heads, blocks, count
    if vectors:
        found = tensor.new_empty(*shape, head_dim)
    else:
        found = torch.empty(shape, dtype=torch.int32, device=tensor.device)
    first_blocks = blocks if first_blocks is None else first_blocks
    places = PROGRAMS * multiprocessors(tensor.device)
    each = max(1, min(BLOCKS, first_blocks * batch * heads // (PROGRAMS_A_PLACE * places)))
    head_pad = triton.next_power_of_2(head_dim)
    launch(
        farthest_kernel, (ceil_div(first_blocks, each), batch * heads), tensor, found, *tensor.stride(), length,
        blocks, first_blocks, each, heads, COUNT=count, D=head_dim, D_PAD=head_pad, BLOCK=block_size, MOST=BLOCKS,
        VECTORS=vectors,
        num_warps=min(16, max(4, block_size * head_pad * tensor.element_size() // BYTES_OF_WARP)),
    )  # fmt: skip
    return found
