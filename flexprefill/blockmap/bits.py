"""Rows of blocks as bits, 32 to an int32 word."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.geometry import WORD_BITS, ceil_div


def pack_bits(dense: Tensor) -> Tensor:
    """bool [..., N] to int32 [..., ceil(N / 32)]. Bit j of word w is column 32 w + j. The other bits are zero."""
    columns = dense.shape[-1]
    width = ceil_div(columns, WORD_BITS)
    # not bool: torch 2.13 generates C++ that does not compile for a padded comparison
    padded = pad(dense.to(torch.int32), (0, width * WORD_BITS - columns))
    lanes = torch.arange(WORD_BITS, device=dense.device, dtype=torch.int32)
    bits = padded.unflatten(-1, (width, WORD_BITS)) << lanes
    # the bits are disjoint, so their sum is their union and cannot carry
    return bits.sum(-1, dtype=torch.int32)


def unpack_bits(words: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: int32 [..., W] to bool [..., columns]."""
    lanes = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    bits = (words.unsqueeze(-1) >> lanes) & 1
    return bits.flatten(-2)[..., :columns].to(torch.bool)


def popcount(words: Tensor) -> Tensor:
    """How many bits are set in each word: int32, shaped like ``words``."""
    # an arithmetic shift copies the sign bit, and the masks clear the copies
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F
