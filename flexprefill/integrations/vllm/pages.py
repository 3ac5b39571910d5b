"""The keys and values of one request, out of the pages of vLLM's cache."""

from __future__ import annotations

from torch import Tensor


def gather_pages(cache: Tensor, pages: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """Copies a request's keys and values out of a cache on a GPU. One copy, which waits for nothing.

    Args:
        cache: [pages, Hkv, page, 2 D], keys before values in the last dimension. The memory's order is its own.
        pages: The request's pages in their order, int32 or int64 [n] on the cache's device. More than are needed do no
            harm.
        kv_len: The request's tokens so far.

    Returns:
        key and value, [1, Hkv, kv_len, D]. Heads lie within tokens.
    """
    page, head_dim = cache.shape[2], cache.shape[3] // 2
    used = pages[: -(-kv_len // page)]
    both = _in_a_row(cache.transpose(1, 2)[used], kv_len)
    return both[..., :head_dim], both[..., head_dim:]


def gather_pages_of_cpu(cache: Tensor, pages: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """As `gather_pages`, for the cache of vLLM's CPU attention of the instruction set "vec".

    A page of a head holds all its keys, transposed to [D, page], and then its values, [page, D].
    """
    page, head_dim = cache.shape[2], cache.shape[3] // 2
    used = cache[pages[: -(-kv_len // page)]].flatten(2)  # [n, Hkv, 2 · page · D]
    keys, values = used.split(page * head_dim, 2)
    keys = keys.unflatten(2, (head_dim, page)).permute(0, 3, 1, 2)
    values = values.unflatten(2, (page, head_dim)).transpose(1, 2)
    return _in_a_row(keys, kv_len), _in_a_row(values, kv_len)


def _in_a_row(pages: Tensor, kv_len: int) -> Tensor:
    """[n, page, Hkv, D] as [1, Hkv, kv_len, D], always of one layout: another one would compile anew.

    The new dimension comes last, so that its stride depends on kv_len and not on the number of pages.
    """
    return pages.contiguous().flatten(0, 1)[:kv_len][None].transpose(1, 2)
