"""Which keys and blocks sequences and a sliding window leave visible."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks
from flexprefill.blockmap.masking import MaskedBlocks
from flexprefill.variant.sequences import Sequences

BEYOND = 2**31 - 1  # a number, and no length, which torch.compile would take for a constant where it fills a pad


def first_keys(
    sequences: Sequences | None, sliding_window: int | None, geometry: Geometry, device: torch.device
) -> Tensor | None:
    """The first key that each query sees, which with the causal edge is all that hides keys: int32 [1 or B, S_q].

    S_kv for a query that sees none. None where nothing else hides keys.

    Args:
        sliding_window: how many keys a query sees, its own the last; None: all before it.
    """
    offset = geometry.offset
    first = None if sequences is None else sequences.starts[:, offset:]
    if sliding_window is not None:
        behind = torch.arange(offset, geometry.kv_len, device=device, dtype=torch.int32)[None] - (sliding_window - 1)
        first = behind.clamp(min=0) if first is None else torch.maximum(first, behind)
    return None if first is None else first.contiguous()


def blocks_from(first: Tensor, geometry: Geometry) -> MaskedBlocks:
    """What the first keys that queries see [1 or B, S_q] leave of a map's blocks; see classify_blocks."""
    (q_len, kv_len, b), rows, device = geometry, geometry.rows, first.device
    J = torch.arange(geometry.columns, device=device)
    missing = (0, rows * b - q_len)

    def by_block(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, missing, value=value).unflatten(1, (rows, b))

    whole = J * b >= by_block(first, 0).amax(2, keepdim=True)
    whole &= (J + 1) * b <= kv_len
    # a query block's rows stand in one key block, or in that and the next
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
