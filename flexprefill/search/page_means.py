"""PageMeans: block means kept for the pages of a cache, so that no key is pooled twice, whoever asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.search import operator
from flexprefill.variant.paged_kv import PagedKV


class PageMeans:
    """The means of the key blocks of one layer's pages, for all requests that the cache serves.

        means = PageMeans()  # one for each layer of the cache
        prefill_attention(query, paged, config=config, means=means)

    A call pools the blocks that hold its own queries' keys, and earlier blocks that no call has pooled. So the next
    chunk of a prompt, and another request that shares pages, pool nothing that is known. A page holds whole blocks: its
    size is a multiple of ``block_size``.

    The means are those of what a page held when it was pooled. A call counts the keys of its queries' positions as new.
    Call `forget` with all other pages whose keys change: those that get another request's keys without a call with
    these means, as steps of decoding write them.

    It holds one vector for each block of the cache, in the keys' dtype. It is for one thread and one stream at a time.
    """

    def __init__(self) -> None:
        self._kind: dict[str, Any] = {}
        self._means = self._known = torch.empty(0)  # [places, Hkv, D], and bool [places]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._means.nbytes + self._known.nbytes

    def of_blocks(self, paged: PagedKV, q_len: int, block_size: int, implementation: str) -> Tensor:
        """The means of all blocks of the requests. Pools those that are not known or hold one of the last q_len keys.

        Returns:
            [B, Hkv, N, D] in the keys' dtype.

        Raises:
            ValueError: The pages hold no whole blocks, or are of another cache, block size or implementation.
        """
        self._check_kind(paged, block_size, implementation)
        of_pieces = paged.places(block_size).of_pieces  # a piece is a block
        shape, device, place = of_pieces.shape, of_pieces.device, of_pieces.flatten().long()
        block = torch.arange(shape[1], device=device)
        earlier = block < (paged.kv_len - q_len) // block_size
        wanted = ~(self._known.index_select(0, place).view(shape) & earlier)
        pooled = operator.pool_pages(paged, block_size, implementation, wanted)
        held = self._means.index_select(0, place).unflatten(0, shape).transpose(1, 2)
        means = torch.where(wanted[:, None, :, None], pooled, held)
        # requests that share a place write the same numbers to it
        self._means.index_copy_(0, place, means.transpose(1, 2).flatten(0, 1))
        whole = block < paged.kv_len // block_size
        self._known.index_copy_(0, place, whole.repeat(shape[0]))
        return means.contiguous()

    def written(self, paged: PagedKV, q_len: int) -> None:
        """Notes that the last q_len keys of the requests are new, and were not pooled."""
        if self._kind:
            first = (paged.kv_len - q_len) // paged.page_size
            self.forget(paged.block_table[:, first : ceil_div(paged.kv_len, paged.page_size)])

    def forget(self, pages: Tensor | None = None) -> None:
        """Forgets what pages hold: int32 or int64 of any shape, their numbers as in a block table. None: all pages.

        Raises:
            TypeError: ``pages`` is something else.
        """
        if pages is None:
            self._known.zero_()
            return
        if not isinstance(pages, Tensor) or pages.dtype not in (torch.int32, torch.int64):
            found = pages.dtype if isinstance(pages, Tensor) else type(pages).__name__
            raise TypeError(f"pages must be a tensor of int32 or int64, or None, got {found}")
        if self._kind:
            known = self._known.view(self._kind["pages"], -1)
            known.index_fill_(0, pages.flatten().to(known.device, torch.int64), False)

    def _check_kind(self, paged: PagedKV, block_size: int, implementation: str) -> None:
        count, heads, page_size, head_dim = paged.pages_of_keys.shape
        if page_size % block_size:
            raise ValueError(
                f"means is of whole blocks of {block_size} keys, which pages of {page_size} do not hold: pass None, or "
                "a config with a block_size that divides the page size"
            )
        dtype, device = paged.pages_of_keys.dtype, paged.pages_of_keys.device
        kind = {"pages": count, "kv_heads": heads, "page_size": page_size, "head_dim": head_dim, "dtype": dtype}
        kind |= {"device": device, "block_size": block_size, "implementation": implementation}
        for name, ours in self._kind.items():
            if kind[name] != ours:
                raise ValueError(f"means is of a cache with {name} {ours}, got {kind[name]}: it belongs to one layer")
        if not self._kind:
            places = count * (page_size // block_size)
            with torch.inference_mode(False):  # memory made in inference mode could not be written outside of it
                self._means = torch.zeros(places, heads, head_dim, dtype=dtype, device=device)
                self._known = torch.zeros(places, dtype=torch.bool, device=device)
            self._kind = kind
