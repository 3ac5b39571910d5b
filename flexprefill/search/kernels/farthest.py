"""The vectors of each block that lie farthest from its mean, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.geometry import ceil_div


@triton.jit(do_not_specialize=["length", "blocks"])
def farthest_kernel(
    tensor_ptr, found_ptr, stride_b, stride_h, stride_s, stride_d, length, blocks, HEADS,
    COUNT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """One block of [B, HEADS, S, D]: writes indices, int32 [B, HEADS, blocks, COUNT], as two_sided.farthest gives them.

    With VECTORS it writes the vectors themselves, [B, HEADS, blocks, COUNT, D].
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    size = tl.minimum(length - block * BLOCK, BLOCK)
    base = tensor_ptr + (head // HEADS) * stride_b + (head % HEADS) * stride_h
    offsets = (block * BLOCK + s).to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    vectors = tl.load(base + offsets, mask=(s[:, None] < size) & (d[None, :] < D), other=0.0).to(tl.float32)
    difference = vectors - (tl.sum(vectors, 0) / size.to(tl.float32))[None, :]
    distance = tl.sum(tl.where(d[None, :] < D, difference * difference, 0.0), 1)
    distance = tl.where(s < size, distance, float("-inf"))
    left = distance
    for i in tl.static_range(COUNT):
        # a block of fewer vectors names them again
        left = tl.where((i % size) == 0, distance, left)
        index = tl.argmax(left, 0)
        found = (head * blocks + block) * COUNT + i
        if VECTORS:
            place = base + (block * BLOCK + index).to(tl.int64) * stride_s
            vector = tl.load(place + d * stride_d, mask=d < D, other=0.0)
            tl.store(found_ptr + found * D + d, vector, mask=d < D)
        else:
            tl.store(found_ptr + found, index)
        left = tl.where(s == index, float("-inf"), left)


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
    farthest_kernel[(blocks if first_blocks is None else first_blocks, batch * heads)](
        tensor, found, *tensor.stride(), length, blocks, heads, COUNT=count, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), BLOCK=block_size, VECTORS=vectors, num_warps=4,
    )  # fmt: skip
    return found
