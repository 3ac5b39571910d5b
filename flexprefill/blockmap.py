"""BlockMap, the bitset of kept blocks, and its arithmetic. Everything else reads or writes one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from flexprefill.devices import check_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

WORD_BITS = 32


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for non-negative a, also of symbolic sizes under torch.compile."""
    return (a + b - 1) // b


def visible_blocks(q_len: int, kv_len: int, block_size: int, device: torch.device | str) -> Tensor:
    """How many key blocks each query block sees causally, at least in part: int32 [M].

    Queries are the last ``q_len`` of ``kv_len`` positions.
    """
    # in int64: the end of the last row may be past 2**31
    row_end = torch.arange(1, ceil_div(q_len, block_size) + 1, device=device) * block_size
    last_position = row_end.clamp(max=q_len) + (kv_len - q_len) - 1
    return (last_position // block_size + 1).to(torch.int32)


def causal_blocks(q_len: int, kv_len: int, block_size: int, device: torch.device | str) -> Tensor:
    """Which blocks are causally visible at least in part: bool [M, N]."""
    columns = torch.arange(ceil_div(kv_len, block_size), device=device, dtype=torch.int32)
    return columns < visible_blocks(q_len, kv_len, block_size, device)[:, None]


def pack_bits(dense: Tensor) -> Tensor:
    """bool [..., N] to int32 [..., ceil(N / 32)]; bit j of word w is column 32 w + j, the rest is zero."""
    columns = dense.shape[-1]
    width = ceil_div(columns, WORD_BITS)
    # no bools: torch 2.13 generates C++ for a padded comparison that does not compile
    padded = pad(dense.to(torch.int32), (0, width * WORD_BITS - columns))
    lanes = torch.arange(WORD_BITS, device=dense.device, dtype=torch.int32)
    bits = padded.unflatten(-1, (width, WORD_BITS)) << lanes
    # disjoint bits: the int32 sum is their union and cannot carry
    return bits.sum(-1, dtype=torch.int32)


def unpack_bits(words: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: int32 [..., W] to bool [..., columns]."""
    lanes = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    bits = (words.unsqueeze(-1) >> lanes) & 1
    return bits.flatten(-2)[..., :columns].to(torch.bool)


def popcount(words: Tensor) -> Tensor:
    """How many bits are set in each word: int32, of the shape of ``words``."""
    # the masks clear the copies of the sign bit that an arithmetic shift brings in
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """Which blocks of the attention matrix are kept, per batch entry and query head, as bits.

    B batch, H query heads, M = ceil(q_len / block_size) query blocks, N = ceil(kv_len / block_size) key
    blocks. Queries are the last ``q_len`` of ``kv_len`` positions. Blocks in the causal future are never
    kept. A BlockMap is a pytree node and goes in and out of compiled functions.

    Args:
        words: int32 [B, H, M, ceil(N / 32)]; bit j of word w is key block 32 w + j. Bits beyond N and in the
            causal future are zero; :meth:`from_dense` sees to it, and whoever writes words must.
        q_len: number of query tokens.
        kv_len: number of key tokens, at least ``q_len``.
        block_size: edge of a block in tokens.

    Raises:
        TypeError, ValueError: the words' dtype or shape, or a size, does not fit.
    """

    words: Tensor
    q_len: int
    kv_len: int
    block_size: int

    def __post_init__(self) -> None:
        check_sizes(self.q_len, self.kv_len, self.block_size)
        if not _is_plain(self.words, torch.int32):
            raise TypeError(f"words must be an int32 tensor, got {_kind(self.words)}")
        rows = ceil_div(self.q_len, self.block_size)
        width = ceil_div(ceil_div(self.kv_len, self.block_size), WORD_BITS)
        if self.words.dim() != 4 or self.words.shape[2:] != (rows, width) or 0 in self.words.shape:
            raise ValueError(
                f"words must be [B, H, {rows}, {width}] with no size of 0 for q_len={self.q_len}, "
                f"kv_len={self.kv_len}, block_size={self.block_size}, got {list(self.words.shape)}"
            )

    @classmethod
    def from_dense(cls, dense: Tensor, *, q_len: int, kv_len: int, block_size: int) -> BlockMap:
        """The map of a bool tensor [B, H, M, N]; entries in the causal future are dropped.

        Raises:
            TypeError: ``dense`` is not a bool tensor.
            ValueError: its shape does not fit the lengths.
        """
        check_sizes(q_len, kv_len, block_size)
        if not _is_plain(dense, torch.bool):
            raise TypeError(f"dense must be a bool tensor, got {_kind(dense)}")
        rows, columns = ceil_div(q_len, block_size), ceil_div(kv_len, block_size)
        if dense.dim() != 4 or dense.shape[2] != rows or dense.shape[3] != columns:
            raise ValueError(
                f"dense must be [B, H, {rows}, {columns}] for q_len={q_len}, kv_len={kv_len}, "
                f"block_size={block_size}, got {list(dense.shape)}"
            )
        kept = dense & causal_blocks(q_len, kv_len, block_size, dense.device)
        return cls(pack_bits(kept), q_len, kv_len, block_size)

    @classmethod
    def causal(
        cls, batch: int, heads: int, *, q_len: int, kv_len: int, block_size: int, device: torch.device | str = "cpu"
    ) -> BlockMap:
        """The map that keeps every causally visible block: dense causal attention."""
        check_sizes(q_len, kv_len, block_size)
        for name, size in (("batch", batch), ("heads", heads)):
            _check_size(name, size)
        words = pack_bits(causal_blocks(q_len, kv_len, block_size, check_device(device)))
        return cls(words.expand(batch, heads, -1, -1).contiguous(), q_len, kv_len, block_size)

    @classmethod
    def from_chunks(cls, chunks: Iterable[BlockMap]) -> BlockMap:
        """Joins the maps of query chunks that follow each other into the map of all their queries.

        Raises:
            TypeError: ``chunks`` holds something else.
            ValueError: there are none; a chunk does not start where the one before ends, or not on a block's
                edge; or batch, heads, block size or device differ.
        """
        if not isinstance(chunks, Iterable):
            raise TypeError(f"chunks must be a list of BlockMaps, got {type(chunks).__name__}")
        chunks = list(chunks)
        if not chunks:
            raise ValueError("chunks must hold at least one BlockMap, got none")
        for chunk in chunks:
            if not isinstance(chunk, BlockMap):
                raise TypeError(f"chunks must be BlockMaps, got {type(chunk).__name__}")
        first, last = chunks[0], chunks[-1]
        for before, chunk in pairwise(chunks):
            for name, theirs, ours in (
                ("batch and heads", chunk.words.shape[:2], first.words.shape[:2]),
                ("block_size", chunk.block_size, first.block_size),
                ("device", chunk.device, first.device),
                ("offset", chunk.offset, before.kv_len),
            ):
                if theirs != ours:
                    raise ValueError(f"chunks must follow each other: a chunk's {name} must be {ours}, got {theirs}")
            if before.q_len % first.block_size:
                raise ValueError(
                    f"every chunk but the last must be whole blocks of {first.block_size}, got q_len={before.q_len}"
                )
        width = last.words.shape[3]
        words = torch.cat([pad(chunk.words, (0, width - chunk.words.shape[3])) for chunk in chunks], 2)
        return cls(words, sum(chunk.q_len for chunk in chunks), last.kv_len, first.block_size)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockMap:
        """The blocks that a FlexAttention BlockMask visits, full or partial.

        Its mask_mod is not kept, and neither are blocks in the causal future, which a map never holds.

        Raises:
            TypeError: it is no BlockMask.
            ValueError: its blocks are not square, it has more queries than keys, or it is a slice of rows.
        """
        from flexprefill import flex  # flex is a room below this one: it knows FlexAttention

        return flex.from_block_mask(block_mask)

    def to_block_mask(self, mask_mod: Any = None, *, buffers: Any = None) -> BlockMask:
        """This map as a FlexAttention BlockMask, causal per element.

        Blocks that the causal edge crosses are in the partial list, all others in the full list, ascending.

        Args:
            mask_mod: a further mask_mod that hides elements (documents, padding). All kept blocks are then
                partial, since any of them may be cut; :meth:`with_mask` finds out which are. Or a
                BlockMask, as for ``&``.
            buffers: a ListBuffers, whose memory the lists then take; the next mask made with it overwrites them.
                None allocates new memory. Not inside torch.compile.

        Returns:
            A BlockMask with int32 lists [B, H, M, N], contiguous, without the transposed lists that only a
            backward pass needs. Behind each list's last entry are zeros.

        Raises:
            TypeError: mask_mod is no function, or buffers no ListBuffers.
            NotEnoughMemoryError: the lists do not fit into the device's memory.
        """
        from flexprefill import flex

        return flex.to_block_mask(self, mask_mod, buffers)

    @property
    def offset(self) -> int:
        """The position of the first query among the keys, ``kv_len - q_len``."""
        return self.kv_len - self.q_len

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, M, N), in blocks."""
        batch, heads, rows, _ = self.words.shape
        return batch, heads, rows, ceil_div(self.kv_len, self.block_size)

    @property
    def device(self) -> torch.device:
        return self.words.device

    def to(self, device: torch.device | str) -> BlockMap:
        """This map on another device; itself if it is there already.

        Raises:
            TypeError, ValueError: ``device`` is none, or not here.
        """
        words = self.words.to(check_device(device))
        return self if words is self.words else self._with(words)

    def to_dense(self) -> Tensor:
        """bool [B, H, M, N], False in the causal future."""
        return unpack_bits(self.words, ceil_div(self.kv_len, self.block_size))

    def counts(self) -> Tensor:
        """How many key blocks each query block keeps: int32 [B, H, M]."""
        return popcount(self.words).sum(-1, dtype=torch.int32)

    def density(self) -> Tensor:
        """The kept share of the causally visible blocks: float32 [B, H], in 0 … 1."""
        visible = visible_blocks(self.q_len, self.kv_len, self.block_size, self.device).sum(dtype=torch.int64)
        kept = self.counts().sum(-1, dtype=torch.int64)
        return (kept.to(torch.float64) / visible).to(torch.float32)

    def with_mask(self, mask_mod: Any) -> BlockMask:
        """This map's blocks under a further mask_mod, causal per element, as a FlexAttention BlockMask.

        A kept block of which the mask_mod hides every element that the causal edge leaves is dropped, one that it cuts
        is partial, and one that it leaves whole stays full, unless the causal edge crosses it. To find that out it is
        evaluated on every element of every causal block: slow next to an attention call. Once is enough for all layers:

            mask = BlockMap.causal(B, 1, q_len=S, kv_len=S, block_size=128).with_mask(mask_mod)
            block_map & mask  # in each layer

        Args:
            mask_mod: of elementwise operations on (b, h, q_idx, kv_idx), which broadcast against each other.

        Raises:
            TypeError: mask_mod is no function.
        """
        from flexprefill import flex

        return flex.with_mask(self, mask_mod)

    def __and__(self, other: BlockMap | BlockMask) -> BlockMap | BlockMask:
        """Blocks that both maps keep.

        With a FlexAttention BlockMask of the same lengths and block size, of 1 or all heads and batch entries, a
        BlockMask: of the blocks that both keep, those that it has as full are full unless the causal edge crosses
        them, the others partial; its mask_mod is applied after the causal one.
        """
        if _is_block_mask(other):
            from flexprefill import flex

            return flex.to_block_mask(self, other)
        return self._with(self.words & self._words_of(other, "&"))

    def __or__(self, other: BlockMap) -> BlockMap:
        """Blocks that either map keeps."""
        return self._with(self.words | self._words_of(other, "|"))

    def __xor__(self, other: BlockMap) -> BlockMap:
        """Blocks that exactly one of the maps keeps."""
        return self._with(self.words ^ self._words_of(other, "^"))

    def __eq__(self, other: object) -> bool:
        """Whether both maps keep the same blocks of the same lengths. Waits for the device.

        Raises:
            ValueError: the maps are of one geometry but on different devices, or on the device meta.
        """
        if not isinstance(other, BlockMap):
            return NotImplemented
        if self._geometry() != other._geometry():
            return False
        if self.device.type == other.device.type == "meta":
            raise ValueError("== needs maps with bits, got two on the device meta, which has none")
        return torch.equal(self.words, self._words_of(other, "=="))

    __hash__ = None  # compared by content, and a tensor's content can change

    def __repr__(self) -> str:
        if not isinstance(self.words, Tensor):
            return f"BlockMap(words={self.words!r}, q_len={self.q_len}, kv_len={self.kv_len})"
        batch, heads, rows, columns = self.shape
        return (
            f"BlockMap(B={batch}, H={heads}, blocks={rows}x{columns}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, block_size={self.block_size}, device='{self.device}')"
        )

    def _repr_html_(self) -> str | None:
        """A picture of the first heads, for notebooks; None, so that they show the repr, where there are no bits."""
        if not isinstance(self.words, Tensor) or self.device.type == "meta":
            return None
        from flexprefill.plotting.html import map_html  # pictures are a room below this one

        return map_html(self)

    def _with(self, words: Tensor) -> BlockMap:
        return BlockMap(words, self.q_len, self.kv_len, self.block_size)

    def _geometry(self) -> tuple[Any, ...]:
        return tuple(self.words.shape), self.q_len, self.kv_len, self.block_size

    def _words_of(self, other: BlockMap, operator: str) -> Tensor:
        if not isinstance(other, BlockMap):
            raise TypeError(f"{operator} needs a BlockMap on both sides, got {type(other).__name__}")
        if self._geometry() != other._geometry():
            raise ValueError(f"{operator} needs maps of one shape and length, got {self} and {other}")
        if self.device != other.device:
            raise ValueError(
                f"{operator} needs both maps on one device, got {self.device} and {other.device}: "
                "move one with .to(device)"
            )
        return other.words


def check_sizes(q_len: int, kv_len: int, block_size: int) -> None:
    """Raises unless 1 <= q_len <= kv_len and block_size is positive."""
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("block_size", block_size)):
        _check_size(name, size)
    if q_len > kv_len:
        raise ValueError(f"q_len must be at most kv_len (queries are the last positions), got {q_len} > {kv_len}")


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if not 1 <= size < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2**31, got {size}")


def _is_plain(thing: Any, dtype: torch.dtype) -> bool:
    return isinstance(thing, Tensor) and thing.dtype == dtype and thing.layout == torch.strided and not thing.is_nested


def _is_block_mask(thing: Any) -> bool:
    if isinstance(thing, BlockMap):  # the usual case imports nothing
        return False
    from torch.nn.attention.flex_attention import BlockMask

    return isinstance(thing, BlockMask)


def _kind(thing: Any) -> str:
    if not isinstance(thing, Tensor):
        return type(thing).__name__
    return f"{thing.dtype}, {'nested' if thing.is_nested else thing.layout}"


def _unflatten(children: Any, sizes: Any) -> BlockMap:
    (words,) = children
    if isinstance(words, Tensor):
        return BlockMap(words, *sizes)
    # pytree functions put anything in a leaf's place for a while
    block_map = object.__new__(BlockMap)
    for name, part in zip(("words", "q_len", "kv_len", "block_size"), (words, *sizes), strict=True):
        object.__setattr__(block_map, name, part)
    return block_map


pytree.register_pytree_node(
    BlockMap,
    lambda block_map: ([block_map.words], (block_map.q_len, block_map.kv_len, block_map.block_size)),
    _unflatten,
    flatten_with_keys_fn=lambda block_map: (
        [(pytree.GetAttrKey("words"), block_map.words)],
        (block_map.q_len, block_map.kv_len, block_map.block_size),
    ),
    serialized_type_name="flexprefill.BlockMap",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
