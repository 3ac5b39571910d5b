"""Which keys and blocks sequences and a sliding window leave visible."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks
from flexprefill.blockmap.masking import MaskedBlocks
from flexprefill.variant.sequences import Sequences

BEYOND = 2**31 - 1  # not a length: torch.compile would take a length that fills a pad for a constant


def first_keys(
    sequences: Sequences | None, sliding_window: int | None, geometry: Geometry, device: torch.device
) -> Tensor | None:
    """The first key that each query sees, int32 [1 or B, S_q]. It and the causal edge hide all that is hidden.

    It is S_kv for a query that sees none. The result is None if only the causal edge hides keys.

    Args:
        sequences: The batch's, or None.
        sliding_window: How many keys a query sees, its own the last. None: all up to its own.
        geometry: The map's sizes.
        device: Where the result is to be.
    """
    offset = geometry.offset
    first = None if sequences is None else sequences.starts[:, offset:]
    if sliding_window is not None:
        behind = torch.arange(offset, geometry.kv_len, device=device, dtype=torch.int32)[None] - (sliding_window - 1)
        first = behind.clamp(min=0) if first is None else torch.maximum(first, behind)
    return None if first is None else first.contiguous()


def blocks_from(first: Tensor, geometry: Geometry) -> MaskedBlocks:
    """What the first keys that queries see, [1 or B, S_q], leave of a map's blocks. See classify_blocks."""
    (q_len, kv_len, b), rows, device = geometry, geometry.rows, first.device
    J = torch.arange(geometry.columns, device=device)
    missing = (0, rows * b - q_len)

    def by_block(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, missing, value=value).unflatten(1, (rows, b))

    whole = J * b >= by_block(first, 0).amax(2, keepdim=True)
    whole &= (J + 1) * b <= kv_len
    # the rows of a query block stand in one key block or in two that are neighbours
    position = torch.arange(geometry.offset, kv_len, device=device)[None]
    own = by_block(position // b, BEYOND)
    low = own[:, :, :1]
    least = by_block(first, BEYOND)
    later = torch.where(own > low, least, BEYOND)
    last_key = ((J + 1) * b).clamp(max=kv_len) - 1
    left = torch.where(J <= low, least.amin(2, keepdim=True) <= last_key, later.amin(2, keepdim=True) <= last_key)
    left &= low + 1 >= J
    causal = causal_blocks(geometry, device)
    return MaskedBlocks(*(pack_bits(blocks & causal)[:, None] for blocks in (left, whole)))
