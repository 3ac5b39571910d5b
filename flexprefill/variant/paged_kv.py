"""PagedKV: keys and values that lie in the pages of a cache, as serving engines keep them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.places import Places, find_places
from flexprefill.config import check_whole, plain_number
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.inputs import check_attention_inputs, check_strided

SMALLEST_PIECE = 16  # keys: the fewest that FlexAttention's kernels for a GPU take as a block
SIZES = "[pages, Hkv, page size, D]"


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values of requests of one length, in the pages of a cache. It stands for key and value.

        paged = PagedKV(pages_of_keys, pages_of_values, block_table, kv_len)
        prefill_attention(query, paged, config=config)

    ``search_blocks`` pools the keys where they lie. ``prefill_attention`` reads them where they lie if

    - the pages stand one behind the other for each head: page i + 1 begins where page i ends. A tensor
      [pages, page size, Hkv, D] has this order. Pass its ``transpose(1, 2)``;
    - on the CPU, page size and block size have a common divisor of 16 or more;
    - on a GPU, the kernel is Triton's and the page size is a multiple of the block size.

    Otherwise the keys are gathered first, into tensors of their own. ``explain_backend`` says so and why.

    Nothing is copied here. Slots behind the last key and pages of other requests may hold any keys. Their values
    must be finite where they share a page with the last key: a weight of zero times NaN is NaN.

    Args:
        pages_of_keys: [pages, Hkv, page size, D], float16, bfloat16 or float32.
        pages_of_values: [pages, Hkv, page size, Dv], with the dtype and device of the keys.
        block_table: The pages of each request in order, int32 or int64 [B, n]. A page stands at most once in a row.
            Different rows may share pages. Entries behind the last key may hold anything. It must not change while
            this object is used. Entries on a GPU are not checked, because that would wait for them.
        kv_len: Keys of each request. n is at least ceil(kv_len / page size).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape or value does not fit.
    """

    pages_of_keys: Tensor
    pages_of_values: Tensor
    block_table: Tensor
    kv_len: int
    _places: dict[int, Places] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if is_tracing():
            raise ValueError("PagedKV cannot be made inside torch.compile: call prefill_attention outside of it")
        object.__setattr__(self, "kv_len", plain_number(self.kv_len))
        keys, values, table = self.pages_of_keys, self.pages_of_values, self.block_table
        check_strided("pages_of_keys", keys, SIZES)
        check_strided("pages_of_values", values, SIZES)
        if values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"pages_of_values must have the pages, heads and page size of pages_of_keys {list(keys.shape)}, got "
                f"{list(values.shape)}"
            )
        check_whole("kv_len", self.kv_len, 1)
        if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
            found = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"block_table must be a tensor of int32 or int64 [B, n], got {found}")
        used = ceil_div(self.kv_len, self.page_size)
        if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] < used:
            raise ValueError(
                f"block_table must be [B, n] with n of at least {used} for kv_len={self.kv_len} in pages of "
                f"{self.page_size}, got {list(table.shape)}"
            )
        if values.dtype != keys.dtype:
            raise TypeError(f"pages_of_values must have the dtype of pages_of_keys {keys.dtype}, got {values.dtype}")
        for name, tensor in (("pages_of_values", values), ("block_table", table)):
            if tensor.device != keys.device:
                raise ValueError(f"{name} must be on the device of pages_of_keys {keys.device}, got {tensor.device}")
        if table.device.type == "cpu":
            self._check_entries(table[:, :used])

    def _check_entries(self, used: Tensor) -> None:
        pages = self.pages_of_keys.shape[0]
        if not ((used >= 0) & (used < pages)).all():
            raise ValueError(f"block_table must name pages 0 … {pages - 1}, got {used.min()} … {used.max()}")
        if (used.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError("block_table must name a page at most once in a row, got one twice")

    @property
    def page_size(self) -> int:
        """Keys of a page."""
        return self.pages_of_keys.shape[2]

    @property
    def batch(self) -> int:
        """B, the number of requests."""
        return self.block_table.shape[0]

    def stand_ins(self) -> tuple[Tensor, Tensor]:
        """Tensors with the shapes, dtype and device of `gather`'s, without memory and without its numbers."""
        keys, values = (
            pages[:1, :, :1].expand(self.batch, -1, self.kv_len, -1)
            for pages in (self.pages_of_keys, self.pages_of_values)
        )
        return keys, values

    def check_query(self, query: Tensor) -> None:
        """Raises unless these are keys and values for a query [B, Hq, S_q, D]."""
        check_attention_inputs(query, *self.stand_ins())

    def gather(self) -> tuple[Tensor, Tensor]:
        """Copies of the keys [B, Hkv, kv_len, D] and of the values [B, Hkv, kv_len, Dv]."""
        return self._gathered(self.pages_of_keys, 0), self._gathered(self.pages_of_values, 0)

    def gather_keys(self, first: int = 0) -> Tensor:
        """A copy of the keys from a position on, [B, Hkv, kv_len - first, D]."""
        return self._gathered(self.pages_of_keys, first)

    def _gathered(self, pages: Tensor, first: int) -> Tensor:
        skipped = first // self.page_size
        table = self.block_table[:, skipped : ceil_div(self.kv_len, self.page_size)]
        # tokens before heads, so that a page is one piece of memory in both
        tokens = pages.transpose(1, 2).index_select(0, table.flatten()).unflatten(0, table.shape).flatten(1, 2)
        return tokens[:, first - skipped * self.page_size : self.kv_len - skipped * self.page_size].transpose(1, 2)

    def in_a_row(self) -> tuple[Tensor, Tensor] | None:
        """All pages of keys and of values as [1, Hkv, pages · page size, D], not copied; None if that is impossible."""
        found = [_in_a_row(pages) for pages in (self.pages_of_keys, self.pages_of_values)]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @property
    def reach(self) -> int:
        """Elements from the first to behind the last of the pages of keys, or of values if these are more."""
        return max(
            1 + sum((size - 1) * stride for size, stride in zip(pages.shape, pages.stride(), strict=True))
            for pages in (self.pages_of_keys, self.pages_of_values)
        )

    def piece(self, block_size: int) -> int:
        """Keys that a page and a block of this size have in common."""
        return math.gcd(self.page_size, block_size)

    def why_gathered(self, block_size: int) -> str | None:
        """Why a kernel that reads blocks of this size cannot read the pages where they lie; None if it can."""
        if self.piece(block_size) < SMALLEST_PIECE:
            return (
                f"pages of {self.page_size} keys and blocks of {block_size} have no common divisor of "
                f"{SMALLEST_PIECE} or more"
            )
        if self.in_a_row() is None:
            return (
                "the pages of a head do not stand one behind the other, as those of a tensor "
                "[pages, page size, Hkv, D] do"
            )
        return None

    def places(self, block_size: int) -> Places:
        """Where the keys lie, in pieces for blocks of this size. Found once for each size of a piece."""
        size = self.piece(block_size)
        if size not in self._places:
            self._places[size] = find_places(
                self.block_table, self.kv_len, self.page_size, self.pages_of_keys.shape[0], size
            )
        return self._places[size]

    def of_layer(self, pages_of_keys: Tensor, pages_of_values: Tensor) -> PagedKV:
        """The same requests in another layer's pages. What was found out about the block table is kept.

        Args:
            pages_of_keys: As for this object. It has as many pages of the same size.
            pages_of_values: As for this object.

        Raises:
            TypeError, ValueError: As when a PagedKV is made, or the pages are more, fewer or of another size.
        """
        other = PagedKV(pages_of_keys, pages_of_values, self.block_table, self.kv_len)
        ours, theirs = (list(pages.shape)[::2] for pages in (self.pages_of_keys, pages_of_keys))
        if theirs != ours:
            raise ValueError(
                f"pages_of_keys must be {ours[0]} pages of {ours[1]} keys as in the other layer, got {theirs[0]} of "
                f"{theirs[1]}"
            )
        object.__setattr__(other, "_places", self._places)
        return other


def _in_a_row(pages: Tensor) -> Tensor | None:
    count, heads, size, dim = pages.shape
    _, head_stride, token_stride, last = pages.stride()
    if last != 1 or (count > 1 and pages.stride(0) != size * token_stride):
        return None
    shape, strides = (1, heads, count * size, dim), (0, head_stride, token_stride, 1)
    # a stride of 0 would be a layout of its own
    in_a_row = pages.as_strided(shape, (max(1, count * size * token_stride), *strides[1:]))
    return in_a_row.data  # no view of another tensor, whose sizes torch.compile would guard on too
