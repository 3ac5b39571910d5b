"""What a mask leaves of each block: nothing, a part or all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.tracing import is_tracing

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskedBlocks(NamedTuple):
    """Which blocks a mask leaves, as words like a BlockMap's: int32 [1 or B, 1 or H, M, ceil(N / 32)]."""

    left: Tensor  # blocks in which it leaves an element that is not in the causal future
    whole: Tensor  # blocks in which it hides nothing, and that are not wholly in the causal future


def classify_blocks(mask_mod: MaskMod, words: Tensor, geometry: Geometry) -> MaskedBlocks:
    """Evaluates a mask_mod on every element of a map's causal blocks, in pieces that bound the memory.

    A short last key block counts as its nominal size, so it is never whole. It does not matter which blocks the map
    keeps.

    Args:
        mask_mod: FlexAttention's. It is called with index tensors that broadcast against each other. If its result does
            not depend on the batch entry or the head, it is evaluated for one of them.
        words: The map's. They give its batch, heads and device.
        geometry: The map's sizes.
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

    def blocks(elements: Tensor) -> Tensor:  # [..., M, b, N, b]
        return elements.unflatten(3, (-1, b)).unflatten(2, (-1, b))

    masks = evaluate(position[:1], position[:1]).shape[:2]
    left, whole = (torch.zeros(*masks, rows, columns, dtype=torch.bool, device=device) for _ in range(2))
    columns_a_piece = min(columns, max(1, PIECE // (masks.numel() * b * b)))
    rows_a_piece = max(1, PIECE // (masks.numel() * b * b * columns_a_piece))
    for i in range(0, rows, rows_a_piece):
        end_i = min(i + rows_a_piece, rows)
        # the last row stands in for those past the end: it is in the same block
        q = position[i * b : end_i * b].clamp(max=q_len - 1)
        visible = (geometry.offset + min(end_i * b, q_len) - 1) // b + 1
        for j in range(0, visible, columns_a_piece):
            end_j = min(j + columns_a_piece, visible)
            k = position[j * b : end_j * b]
            allowed = evaluate(q, k.clamp(max=kv_len - 1)) & (k < kv_len)
            piece = (slice(None), slice(None), slice(i, end_i), slice(j, end_j))
            left[piece] = blocks(allowed & (q[:, None] + geometry.offset >= k)).any(5).any(3)
            whole[piece] = blocks(allowed).all(5).all(3)
    return MaskedBlocks(pack_bits(left), pack_bits(whole & causal_blocks(geometry, device)))


MASK_MOD_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")


def check_mod(name: str, mod: object, arguments: Sequence[str]) -> None:
    """Raises TypeError unless it is None or a function that can be called with these arguments."""
    if mod is None:
        return
    listed = ", ".join(arguments)
    if not callable(mod):
        raise TypeError(f"{name} must be a function of ({listed}), got {type(mod).__name__}")
    if is_tracing():
        return
    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):  # a builtin says nothing of its arguments
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must be a function of ({listed}), got one of {signature}") from error
