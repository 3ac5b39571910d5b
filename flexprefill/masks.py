"""What a mask leaves of each block: nothing, a part or all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap import BlockMap, causal_blocks, ceil_div, pack_bits

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PIECE = 2**24  # elements at a time


class MaskedBlocks(NamedTuple):
    """Which blocks a mask leaves, as words like a BlockMap's: int32 [1 or B, 1 or H, M, ceil(N / 32)]."""

    left: Tensor  # blocks of which it leaves an element that is not in the causal future
    whole: Tensor  # blocks that are not wholly in the causal future, and of which it hides nothing


def classify_blocks(mask_mod: MaskMod, block_map: BlockMap) -> MaskedBlocks:
    """Evaluates a mask_mod on every element of a map's causal blocks, in pieces that bound the memory.

    A short last key block counts as its nominal size, so it is never whole. The map's own blocks do not matter.

    Args:
        mask_mod: FlexAttention's. It is called with index tensors that broadcast against each other; where its result
            does not depend on the batch entry or the head, it is evaluated for one.
    """
    batch, heads, rows, columns = block_map.shape
    q_len, kv_len, b, device = block_map.q_len, block_map.kv_len, block_map.block_size, block_map.device
    entry = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    position = torch.arange(max(ceil_div(kv_len, b), rows) * b, device=device)

    def evaluate(q: Tensor, k: Tensor) -> Tensor:
        allowed = torch.as_tensor(mask_mod(entry, head, q[:, None], k), dtype=torch.bool, device=device)
        allowed = allowed[(None,) * (4 - allowed.dim())]
        return allowed.expand(*allowed.shape[:2], q.shape[0], k.shape[0])

    masks = evaluate(position[:1], position[:1]).shape[:2]
    left, whole = (torch.zeros(*masks, rows, columns, dtype=torch.bool, device=device) for _ in range(2))
    columns_a_piece = min(columns, max(1, PIECE // (masks.numel() * b * b)))
    rows_a_piece = max(1, PIECE // (masks.numel() * b * b * columns_a_piece))
    for i in range(0, rows, rows_a_piece):
        end_i = min(i + rows_a_piece, rows)
        q = position[i * b : min(end_i * b, q_len)]
        last_visible = (block_map.offset + q.shape[0] + i * b - 1) // b
        for j in range(0, last_visible + 1, columns_a_piece):
            end_j = min(j + columns_a_piece, last_visible + 1)
            k = position[j * b : min(end_j * b, kv_len)]
            allowed = evaluate(q, k)
            seen = allowed & (q[:, None] + block_map.offset >= k)
            missing_keys, missing_rows = (0, end_j * b - j * b - len(k)), (0, 0, 0, end_i * b - i * b - len(q))
            seen, allowed = pad(seen, missing_keys), pad(allowed, missing_keys)
            # rows past the end hide nothing, keys past the end do
            seen, allowed = pad(seen, missing_rows), pad(allowed, missing_rows, value=True)
            piece = (slice(None), slice(None), slice(i, end_i), slice(j, end_j))
            left[piece] = seen.unflatten(3, (-1, b)).unflatten(2, (-1, b)).any(5).any(3)
            whole[piece] = allowed.unflatten(3, (-1, b)).unflatten(2, (-1, b)).all(5).all(3)
    return MaskedBlocks(pack_bits(left), pack_bits(whole & causal_blocks(q_len, kv_len, b, device)))
