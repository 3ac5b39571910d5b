"""Dense attention without FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Attention of the last position alone: it sees all keys.

    Args:
        query: [B, Hq, 1, D]; key: [B, Hkv, S_kv, D]; value: [B, Hkv, S_kv, Dv].
        scale: positive.

    Returns:
        [B, Hq, 1, Dv].
    """
    with torch.no_grad():
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
