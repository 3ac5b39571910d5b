"""BlockMap, the bitset of kept blocks, and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexprefill.blockmap.bits import WORD_BITS, pack_bits, popcount, unpack_bits
from flexprefill.blockmap.block_mask import Mask, block_mask_of, cut_by, list_blocks, masks_of, read_block_mask
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div, visible_blocks
from flexprefill.blockmap.html import map_html
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.masking import MASK_MOD_ARGUMENTS, MaskMod, check_mod, classify_blocks
from flexprefill.config import check_whole
from flexprefill.runtime.devices import check_device
from flexprefill.runtime.layout import layout_hint
from flexprefill.runtime.listeners import note
from flexprefill.runtime.pytrees import register_node

Blocks = TypeVar("Blocks", "BlockMap", BlockMask)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap:
    """The blocks of the attention matrix that are kept, for each batch entry and query head, as bits.

    B is the batch size, H the number of query heads. There are M = ceil(q_len / block_size) query blocks and
    N = ceil(kv_len / block_size) key blocks. Queries are the last ``q_len`` of ``kv_len`` positions. Blocks in the
    causal future are never kept. A BlockMap is a pytree node: it goes in and out of compiled functions.

    Args:
        words: int32 [B, H, M, ceil(N / 32)]. Bit j of word w is key block 32 w + j. Bits beyond N and in the causal
            future must be zero. `from_dense` makes such words.
        q_len: Number of query tokens.
        kv_len: Number of key tokens, at least ``q_len``.
        block_size: Edge of a block in tokens.

    Raises:
        TypeError: The words or a size have the wrong type.
        ValueError: The words' shape or a size does not fit.
    """

    words: Tensor
    q_len: int
    kv_len: int
    block_size: int

    def __post_init__(self) -> None:
        geometry = self.geometry
        geometry.check()
        _check_tensor("words", self.words, torch.int32, "an int32 tensor")
        rows, width = geometry.rows, ceil_div(geometry.columns, WORD_BITS)
        if self.words.dim() != 4 or self.words.shape[2:] != (rows, width) or 0 in self.words.shape:
            raise ValueError(
                f"words must be [B, H, {rows}, {width}] with no size of 0 for q_len={self.q_len}, "
                f"kv_len={self.kv_len}, block_size={self.block_size}, got {list(self.words.shape)}"
            )

    @classmethod
    def from_dense(cls, dense: Tensor, *, q_len: int, kv_len: int, block_size: int) -> BlockMap:
        """The map of a bool tensor [B, H, M, N]. Entries in the causal future are dropped.

        Raises:
            TypeError: ``dense`` is not a bool tensor, or a size no int.
            ValueError: The shape does not fit the lengths.
        """
        geometry = Geometry.checked(q_len, kv_len, block_size)
        _check_tensor("dense", dense, torch.bool, "a bool tensor")
        rows, columns = geometry.rows, geometry.columns
        if dense.dim() != 4 or dense.shape[2] != rows or dense.shape[3] != columns:
            raise ValueError(
                f"dense must be [B, H, {rows}, {columns}] for q_len={q_len}, kv_len={kv_len}, "
                f"block_size={block_size}, got {list(dense.shape)}"
            )
        return cls(pack_bits(dense & causal_blocks(geometry, dense.device)), *geometry)

    @classmethod
    def causal(
        cls, batch: int, heads: int, *, q_len: int, kv_len: int, block_size: int, device: torch.device | str = "cpu"
    ) -> BlockMap:
        """The map that keeps every causally visible block: dense causal attention.

        Raises:
            TypeError: A size is no int, or ``device`` no device.
            ValueError: A size is out of range, or ``device`` is not here.
        """
        geometry = Geometry.checked(q_len, kv_len, block_size)
        check_whole("batch", batch, 1)
        check_whole("heads", heads, 1)
        words = pack_bits(causal_blocks(geometry, check_device(device)))
        return cls(words.expand(batch, heads, -1, -1).contiguous(), *geometry)

    @classmethod
    def from_chunks(cls, chunks: Iterable[BlockMap]) -> BlockMap:
        """Joins the maps of query chunks that follow each other into the map of all their queries.

        Raises:
            TypeError: ``chunks`` holds something else.
            ValueError: There are none. Or a chunk does not start on a block's edge where the one before ends. Or
                batch, heads, block size or device differ.
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

        The map does not keep its mask_mod. It keeps no blocks in the causal future either.

        Raises:
            TypeError: It is no BlockMask.
            ValueError: Its blocks are not square, it has more queries than keys, or it is a slice of rows.
        """
        kept, geometry = read_block_mask(block_mask)
        return cls.from_dense(kept, **geometry._asdict())

    def to_block_mask(
        self, mask_mod: MaskMod | BlockMask | None = None, *, buffers: ListBuffers | None = None
    ) -> BlockMask:
        """This map as a FlexAttention BlockMask, causal for each element.

        Blocks that the causal edge crosses are in the partial list. All others are in the full list. Both ascend.

        Args:
            mask_mod: A further mask_mod that hides elements, such as documents or padding. Any kept block may then be
                cut, so all are partial. `with_mask` finds out which ones are cut. Or a BlockMask, as for ``&``.
            buffers: The lists take the memory of this ListBuffers. The next mask made with it overwrites them. None
                allocates new memory. Not for use inside torch.compile.

        Returns:
            A BlockMask with int32 lists [B, H, M, N], contiguous, with zeros behind the last entry. It has no
            transposed lists, because only a backward pass needs them.

        Raises:
            TypeError: ``mask_mod`` is no function, or ``buffers`` no ListBuffers.
            ValueError: ``mask_mod`` is a BlockMask that does not fit the map.
            NotEnoughMemoryError: The lists do not fit into the device's memory.
        """
        masks = masks_of(mask_mod, self.words, self.geometry)
        return block_mask_under(self, masks, buffers, untold=masks)

    @property
    def geometry(self) -> Geometry:
        """q_len, kv_len and block_size."""
        return Geometry(self.q_len, self.kv_len, self.block_size)

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
        """This map on another device. It is the map itself if it is there already.

        Raises:
            TypeError: ``device`` is no device.
            ValueError: ``device`` is not here.
        """
        words = self.words.to(check_device(device))
        return self if words is self.words else replace(self, words=words)

    def to_dense(self) -> Tensor:
        """bool [B, H, M, N], False in the causal future."""
        return unpack_bits(self.words, ceil_div(self.kv_len, self.block_size))

    def counts(self) -> Tensor:
        """How many key blocks each query block keeps: int32 [B, H, M]."""
        return popcount(self.words).sum(-1, dtype=torch.int32)

    def density(self) -> Tensor:
        """The kept share of the causally visible blocks: float32 [B, H], in 0 … 1."""
        visible = visible_blocks(self.geometry, self.device).sum(dtype=torch.int64)
        kept = self.counts().sum(-1, dtype=torch.int64)
        return (kept.to(torch.float64) / visible).to(torch.float32)

    def with_mask(self, mask_mod: MaskMod) -> BlockMask:
        """This map's blocks under a further mask_mod, causal for each element, as a FlexAttention BlockMask.

        A block is dropped if the mask_mod hides everything that the causal edge leaves of it. A block that the
        mask_mod or the causal edge cuts is partial. All others are full. To find that out, the mask_mod is evaluated on
        every element of every causal block. That is slow next to an attention call, but once is enough for all layers:

            mask = BlockMap.causal(B, 1, q_len=S, kv_len=S, block_size=128).with_mask(mask_mod)
            block_map & mask  # in each layer

        Args:
            mask_mod: Elementwise operations on (b, h, q_idx, kv_idx). These tensors broadcast against each other.

        Raises:
            TypeError: ``mask_mod`` is no function.
        """
        if mask_mod is None:
            raise TypeError("mask_mod must be a function of (b, h, q_idx, kv_idx), got NoneType")
        check_mod("mask_mod", mask_mod, MASK_MOD_ARGUMENTS)
        masks = (Mask(mask_mod, classify_blocks(mask_mod, self.words, self.geometry)),)
        return block_mask_under(self, masks, untold=masks)

    def __and__(self, other: Blocks) -> Blocks:
        """Blocks that both maps keep.

        ``other`` can be a FlexAttention BlockMask of the same lengths and block size, for one or all heads and batch
        entries. The result is then a BlockMask of the blocks that both keep. A block is full if it is full in
        ``other`` and the causal edge does not cross it. Otherwise it is partial. The mask_mod of ``other`` is applied
        after the causal one.
        """
        if isinstance(other, BlockMask):
            return self.to_block_mask(other)
        return replace(self, words=self.words & self._words_of(other, "&"))

    def __or__(self, other: BlockMap) -> BlockMap:
        """Blocks that either map keeps."""
        return replace(self, words=self.words | self._words_of(other, "|"))

    def __xor__(self, other: BlockMap) -> BlockMap:
        """Blocks that exactly one of the maps keeps."""
        return replace(self, words=self.words ^ self._words_of(other, "^"))

    def __eq__(self, other: object) -> bool:
        """Whether both maps keep the same blocks of the same lengths. Waits for the device.

        Raises:
            ValueError: The maps have one geometry but are on different devices, or on the device meta.
        """
        if not isinstance(other, BlockMap):
            return NotImplemented
        if self._sizes() != other._sizes():
            return False
        if self.device.type == other.device.type == "meta":
            raise ValueError("== needs maps with bits, got two on the device meta, which has none")
        return torch.equal(self.words, self._words_of(other, "=="))

    __hash__ = None  # type: ignore[assignment]  # as data classes do: compared by content, and a tensor's content can change

    def __repr__(self) -> str:
        if not isinstance(self.words, Tensor):
            return f"BlockMap(words={self.words!r}, q_len={self.q_len}, kv_len={self.kv_len})"
        batch, heads, rows, columns = self.shape
        return (
            f"BlockMap(B={batch}, H={heads}, blocks={rows}x{columns}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, block_size={self.block_size}, device='{self.device}')"
        )

    def _repr_html_(self) -> str | None:
        """A picture of the first heads, for notebooks. None where there are no bits: they then show the repr."""
        if not isinstance(self.words, Tensor) or self.device.type == "meta":
            return None
        return map_html(self.words, self.geometry, self.density())

    def _sizes(self) -> tuple[Any, ...]:
        return tuple(self.words.shape), self.geometry

    def _words_of(self, other: BlockMap, operator: str) -> Tensor:
        if not isinstance(other, BlockMap):
            raise TypeError(f"{operator} needs a BlockMap on both sides, got {type(other).__name__}")
        if self._sizes() != other._sizes():
            raise ValueError(f"{operator} needs maps of one shape and length, got {self} and {other}")
        if self.device != other.device:
            raise ValueError(
                f"{operator} needs both maps on one device, got {self.device} and {other.device}: "
                "move one with .to(device)"
            )
        return other.words


def _check_tensor(name: str, thing: object, dtype: torch.dtype, wanted: str) -> None:
    if not isinstance(thing, Tensor):
        raise TypeError(f"{name} must be {wanted}, got {type(thing).__name__}")
    if thing.dtype != dtype or thing.layout != torch.strided or thing.is_nested:
        layout = "nested" if thing.is_nested else thing.layout
        raise TypeError(f"{name} must be {wanted}, got {thing.dtype}, {layout}")


register_node(BlockMap, ("words",), ("q_len", "kv_len", "block_size"))


def all_blocks(query: Tensor, key: Tensor, block_size: int) -> BlockMap:
    """The map of dense causal attention of these tensors, [B, Hq, S_q, D] and [B, Hkv, S_kv, D]."""
    sizes = {"q_len": query.shape[2], "kv_len": key.shape[2], "block_size": block_size}
    return BlockMap.causal(query.shape[0], query.shape[1], **sizes, device=query.device)


def block_mask_under(
    block_map: BlockMap,
    masks: Sequence[Mask],
    buffers: ListBuffers | None = None,
    *,
    untold: Sequence[Mask] = (),
) -> BlockMask:
    """The BlockMask of a map's blocks under masks. Listeners hear of those that note_attention did not name."""
    words, cut = cut_by(block_map.words, masks)
    note(replace(block_map, words=words), block_map, tuple(mask.mod for mask in untold))
    return block_mask_of(list_blocks(words, block_map.geometry, cut, buffers), block_map.geometry)


def check_block_map(block_map: BlockMap, query: Tensor, key: Tensor) -> None:
    """Raises unless a map has query's batch size, heads, lengths and device."""
    check_is_map("block_map", block_map)
    if (block_map.q_len, block_map.kv_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"block_map must be of q_len={query.shape[2]} and kv_len={key.shape[2]}, "
            f"got q_len={block_map.q_len} and kv_len={block_map.kv_len}{layout_hint(query=query, key=key)}"
        )
    if block_map.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"block_map must have query's batch size and heads {tuple(query.shape[:2])}, got {block_map.shape[:2]}"
        )
    if block_map.device != query.device:
        raise ValueError(f"block_map must be on query's device {query.device}, got {block_map.device}")


def check_is_map(name: str, block_map: object) -> None:
    """Raises TypeError unless it is a BlockMap."""
    if not isinstance(block_map, BlockMap):
        hint = "; BlockMap.from_block_mask makes one of it" if isinstance(block_map, BlockMask) else ""
        raise TypeError(f"{name} must be a BlockMap, got {type(block_map).__name__}{hint}")


def check_has_bits(name: str, block_map: object) -> None:
    """Raises unless it is a BlockMap whose bits can be read."""
    check_is_map(name, block_map)
    if isinstance(block_map, BlockMap) and block_map.device.type == "meta":
        raise ValueError(f"{name} must have bits, got a map on the device meta, which has none")


def check_index(name: str, index: object, size: int) -> None:
    """Raises unless it is an int in 0 … size - 1."""
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"{name} must be an int, got {index!r}")
    if not 0 <= index < size:
        raise ValueError(f"{name} must be one of 0 … {size - 1}, got {index}")
