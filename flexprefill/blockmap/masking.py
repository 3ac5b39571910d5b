"""What a mask leaves of each block: nothing, a part or all of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.tracing import is_tracing

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskedBlocks(NamedTuple):
    """Which blocks a mask leaves, as words like a BlockMap's: int32 [1 or B, 1 or H, M, ceil(N / 32)]."""

    left: Tensor  # blocks of which it leaves an element that is not in the causal future
    whole: Tensor  # blocks that are not wholly in the causal future, and of which it hides nothing


def classify_blocks(mask_mod: MaskMod, words: Tensor, geometry: Geometry) -> MaskedBlocks:
    """Evaluates a mask_mod on every element of a map's causal blocks, in pieces that bound the memory.

    A short last key block counts as its nominal size, so it is never whole. The map's own blocks do not matter.

    Args:
        words: of the map, for its batch, heads and device.
        mask_mod: FlexAttention's. It is called with index tensors that broadcast against each other; where its result
            does not depend on the batch entry or the head, it is evaluated for one.
    """
    (batch, heads), rows, columns = words.shape[:2], geometry.rows, geometry.columns
    (q_len, kv_len, b), device = geometry, words.device
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
        last_visible = (geometry.offset + q.shape[0] + i * b - 1) // b
        for j in range(0, last_visible + 1, columns_a_piece):
            end_j = min(j + columns_a_piece, last_visible + 1)
            k = position[j * b : min(end_j * b, kv_len)]
            allowed = evaluate(q, k)
            seen = allowed & (q[:, None] + geometry.offset >= k)
            missing_keys, missing_rows = (0, end_j * b - j * b - len(k)), (0, 0, 0, end_i * b - i * b - len(q))
            seen, allowed = pad(seen, missing_keys), pad(allowed, missing_keys)
            # rows past the end hide nothing, keys past the end do
            seen, allowed = pad(seen, missing_rows), pad(allowed, missing_rows, value=True)
            piece = (slice(None), slice(None), slice(i, end_i), slice(j, end_j))
            left[piece] = seen.unflatten(3, (-1, b)).unflatten(2, (-1, b)).any(5).any(3)
            whole[piece] = allowed.unflatten(3, (-1, b)).unflatten(2, (-1, b)).all(5).all(3)
    return MaskedBlocks(pack_bits(left), pack_bits(whole & causal_blocks(geometry, device)))


MASK_MOD_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")


def check_mod(name: str, mod: object, arguments: Sequence[str]) -> None:
    """Raises TypeError unless it is None or a function that can be called with these."""
    if mod is None:
        return
    listed = ", ".join(arguments)
    if not callable(mod):
        raise TypeError(f"{name} must be a function of ({listed}), got {type(mod).__name__}")
    if is_tracing():
        return
    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):  # of a builtin, which says nothing
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must be a function of ({listed}), got one of {signature}") from error
