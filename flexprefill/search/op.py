"""The two halves of the search by either implementation, and the whole as one custom operator.

The operator is opaque to torch.compile, so that every length gives one graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.blockmap import WORD_BITS, ceil_div, pack_bits
from flexprefill.operators import operator
from flexprefill.search import reference
from flexprefill.search.rule import Rule


@operator("flexprefill::search_words")
def search_words(
    query: Tensor,
    key: Tensor,
    scale: float,
    log2_alpha: float,
    block_size: int,
    sink_blocks: int,
    window_blocks: int,
    last_full_blocks: int,
    min_blocks: int,
    implementation: str,
) -> Tensor:
    """query [B, Hq, S_q, D] and key [B, Hkv, S_kv, D] to a BlockMap's words, int32 [B, Hq, M, ceil(N / 32)]."""
    rule = Rule(scale, log2_alpha, block_size, sink_blocks, window_blocks, last_full_blocks, min_blocks)
    return score_words(query, pool_keys(key, block_size, implementation), key.shape[2], rule, implementation)


@torch.library.register_fake("flexprefill::search_words")
def _(query, key, scale, log2_alpha, block_size, *rest):
    batch, heads, q_len, _ = query.shape
    width = ceil_div(ceil_div(key.shape[2], block_size), WORD_BITS)
    return query.new_empty((batch, heads, ceil_div(q_len, block_size), width), dtype=torch.int32)


def pool_keys(key: Tensor, block_size: int, implementation: str) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D]."""
    if implementation == "reference":
        return reference.pool_keys(key, block_size)
    from flexprefill.search import kernels  # imports triton

    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(key):
        return kernels.pool_keys(key, block_size)


def score_words(query: Tensor, means: Tensor, kv_len: int, rule: Rule, implementation: str) -> Tensor:
    """A BlockMap's words, int32 [B, Hq, M, ceil(N / 32)], from the means of the kv_len keys' blocks: [B, Hkv, N, D]."""
    if implementation == "reference":
        return pack_bits(reference.select_blocks(query, means, kv_len, rule))
    from flexprefill.search import kernels  # imports triton

    with torch.cuda.device_of(query):
        return kernels.score_words(query, means, kv_len, rule)
