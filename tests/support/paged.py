"""Keys and values laid into the pages of a cache, in an order of chance."""

import torch

from flexprefill import PagedKV

UNREAD = torch.nan  # in pages that are not the request's, and as the keys of slots that hold none
FINITE = 7.0  # the values of slots that hold none, in a page that is the request's


def laid_in(shape, key, value, table):
    """Writes key and value [B, H, S, D] to fresh pages [pages, page size]; returns them as [pages, H, page size, D]."""
    pages = [
        torch.full(
            (shape[0], shape[1], tensor.shape[1], tensor.shape[3]), UNREAD, dtype=tensor.dtype, device=key.device
        )
        for tensor in (key, value)
    ]
    pages[1][table.flatten().long()] = FINITE
    position = torch.arange(key.shape[2], device=key.device)
    page, slot = table[:, position // shape[1]].long(), position % shape[1]
    for tensor, held in zip((key, value), pages, strict=True):
        held[page, slot] = tensor.transpose(1, 2)
    return [held.transpose(1, 2) for held in pages]


def in_pages(key, value, page_size, *, more=3, seed=0):
    """A PagedKV of key and value [B, H, S, D], its pages shuffled among ``more`` that hold NaN."""
    batch, _, length, _ = key.shape
    used = -(-length // page_size)
    count = batch * used + more
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(key.device, torch.int32)
    table = order[: batch * used].view(batch, used)
    return PagedKV(*laid_in((count, page_size), key, value, table), table, length)


def interleaved(paged):
    """The same with keys and values as views of one memory, [pages, page size, H, D + Dv], as vLLM keeps them."""
    both = torch.cat([paged.pages_of_keys, paged.pages_of_values], 3).transpose(1, 2).contiguous().transpose(1, 2)
    dim = paged.pages_of_keys.shape[3]
    return PagedKV(both[..., :dim], both[..., dim:], paged.block_table, paged.kv_len)
