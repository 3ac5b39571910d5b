"""Attention of one long prompt of a batch, and the calls that compile it before a request comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.attention.prefill import prefill_attention
from flexprefill.attention.tail import TAIL_SPLIT_FROM
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.search.blocks import search_blocks
from flexprefill.variant.variant import PLAIN, AttentionVariant

PAGE = 128  # of the cache to warm up with; what is compiled does not depend on it


@dataclass(frozen=True)
class ServedLayer:
    """What the attention of a layer is.

    Attributes:
        config: Which blocks it keeps.
        scale: Factor on the dot products.
        variant: A soft cap, if the layer has one.
    """

    config: PrefillConfig
    scale: float
    variant: AttentionVariant = PLAIN


def attend_prompt(layer: ServedLayer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, BlockMap]:
    """Search and sparse attention of the last S_q of S_kv positions of one request.

    vLLM does not say whether another chunk of the prompt follows. So each chunk keeps its last
    ``config.last_full_blocks`` query blocks whole.

    Args:
        query: [S_q, Hq, D].
        key: [1, Hkv, S_kv, D].
        value: [1, Hkv, S_kv, D].

    Returns:
        The output, [S_q, Hq, D], and what was kept.

    Raises:
        TypeError, ValueError, NotEnoughMemoryError: As prefill_attention.
    """
    # compiled models hand over whole tensors, others views of a fused projection: two layouts would compile twice
    heads_first = query.contiguous()[None].transpose(1, 2)
    variant, scale = layer.variant, layer.scale
    kept = search_blocks(heads_first, key, layer.config, variant=variant, scale=scale)
    output = prefill_attention(heads_first, key, value, layer.config, variant=variant, block_map=kept, scale=scale)
    return output[0].transpose(0, 1), kept


Gather = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # gather_pages or gather_pages_of_cpu


class Sizes(NamedTuple):
    """What the tensors of a process's layers are, and the longest prompt."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    most_keys: int


def warm_up(layer: ServedLayer, sizes: Sizes, gather: Gather) -> None:
    """Compiles what `attend_prompt` needs, so that no request waits for it.

    Args:
        layer: The attention's kind.
        sizes: Its tensors'.
        gather: How its keys and values come from the cache, which decides on their layout.

    Raises:
        FlexPrefillError: Compiling is switched off, or there is no compiler.
    """
    heads, kv_heads, head_dim, dtype, device, most_keys = sizes
    for q_len, kv_len in lengths_to_warm(device.type == "cuda", most_keys):
        query = torch.zeros(q_len, heads, head_dim, dtype=dtype, device=device)
        cache = torch.zeros(ceil_div(kv_len, PAGE), kv_heads, PAGE, 2 * head_dim, dtype=dtype, device=device)
        pages = torch.arange(len(cache), dtype=torch.int32, device=device)
        attend_prompt(layer, query, *gather(cache, pages, kv_len))


def lengths_to_warm(on_gpu: bool, most_keys: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of prompts that together meet each kind of call.

    The kinds: whole or ragged tiles, for each of which a GPU has a kernel; at the start of a prompt or behind a cache;
    and on a GPU the split tail of long prompts, whole ones too, and the search's three steps of words, from 256 and
    from 512 key blocks on. There are two lengths of each, because Triton compiles once more where a length or its
    number of blocks is a multiple of 16. tests/support/served_program.py finds what is missing.
    """
    lengths = [(1024, 1024), (2048, 2048), (1024, 3072), (1280, 4352)]
    if on_gpu:
        lengths += [(1001, 1001), (2041, 2041), (1001, 3077), (1307, 4409)]
        tail = TAIL_SPLIT_FROM
        lengths += [(4096, tail), (4352, tail + 4096), (4001, tail + 17), (4307, tail + 4089)]
        lengths += [(1024, 40_960), (1024, 73_728), (tail, tail)]
    # the first ones in any case: shorter prompts are of their kind
    return ((q_len, kv_len) for q_len, kv_len in lengths if kv_len <= max(most_keys, 2048))
