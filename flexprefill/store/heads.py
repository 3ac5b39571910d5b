"""How heads' words become bytes of a file, and back. In NumPy: torch's own threads cost more than they give here."""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flexprefill.blockmap.bits import pack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div, visible_blocks
from flexprefill.store.contents import triangle_bits, triangle_bytes, words_shape

Words = NDArray[np.int32]  # of maps, 32 blocks each
Stream = NDArray[np.uint64]  # of files, 64 blocks each
Numbers = NDArray[np.int64]
STREAM_BITS = 64
WORDS_AT_A_TIME = 2**18  # some megabytes, which stay in the cache


class TrianglePacking:
    """From the words of heads of this geometry to their streams.

    Attributes:
        words_per_head: M · W.
        bits: blocks in a head's stream.
        size: bytes of a head's stream.
        most: heads to pack at a time, for :func:`even_step`.
    """

    def __init__(self, geometry: Geometry) -> None:
        rows, width = words_shape(geometry)
        self.words_per_head = rows * width
        self.bits = triangle_bits(geometry)
        self.size = ceil_div(self.bits, 8)
        self._odd = (rows, width) if width % 2 else None
        place, start, visible = _rows_in_stream(geometry)

        # each row's words of 64 bits; the last row has one more, of no bits, for what the one before does not hold
        words_of_row = _words_for(visible)
        words_of_row[-1] += 1
        row, word = _numbered(words_of_row)
        self._word = row * ceil_div(width, 2) + word
        self._mask = _low_bits(visible[row] - STREAM_BITS * word)
        self._left, self._right = _shifts(start[row])
        self._scratch = _Scratch(len(row))
        self.most = max(1, WORDS_AT_A_TIME // len(row))
        # a word begins in this one of the stream and goes on in the next; where rows meet, several begin in one
        target = place[row] + word
        self._first = np.unique(target, return_index=True)[1][: ceil_div(self.bits, STREAM_BITS)]
        self._others = (np.diff(target) == 0).nonzero()[0] + 1
        self._place, self._first_there = np.unique(target[self._others], return_index=True)

    def pack(self, words: Words) -> Stream:
        """The streams of [heads, M · W]: [heads, size / 8 rounded up], zero bits after each."""
        if self._odd is not None:
            words = np.pad(words.reshape(-1, *self._odd), ((0, 0), (0, 0), (0, 1))).reshape(len(words), -1)
        begun, rest = self._scratch.arrays(len(words))
        np.take(words.view(np.uint64), self._word, axis=1, out=rest, mode="wrap")  # the fastest mode
        rest &= self._mask
        np.left_shift(rest, self._left, out=begun)
        rest >>= self._right
        begun[:, 1:] |= rest[:, :-1]
        stream = begun.take(self._first, axis=1, mode="wrap")
        if len(self._others):
            others = begun.take(self._others, axis=1, mode="wrap")
            stream[:, self._place] |= np.bitwise_or.reduceat(others, self._first_there, axis=1)
        return stream


class TriangleUnpacking:
    """From the streams of heads of this geometry to their words.

    Attributes:
        size: bytes of a head's stream.
        most: heads to unpack at a time, for :func:`even_step`.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._shape = words_shape(geometry)
        self._in_last = triangle_bits(geometry) % STREAM_BITS
        self.size = triangle_bytes(geometry)
        place, start, visible = _rows_in_stream(geometry)

        # each row's words of 64 bits, and one more of no bits, since the last one may go on in the stream's next
        width = _words_for(visible)
        row, word = _numbered(width + 1)
        self._word = place[row] + word
        self._mask = _low_bits(visible[row] - STREAM_BITS * word)
        self._left, self._right = _shifts(start[row])
        self._scratch = _Scratch(len(row))
        self.most = max(1, WORDS_AT_A_TIME // len(row))
        # rows of equally many words follow each other: that number, their first row, and its first word
        self._widths, first = np.unique(width, return_index=True)
        self._rows = [*first, len(width)]
        self._words = [*(word == 0).nonzero()[0][first], len(word)]

    def unpack(self, stream: Stream, words: Words) -> bool:
        """Writes the words of [heads, size / 8 rounded up] to [heads, M · W], which is zero before.

        Returns:
            whether no bit after a last block is set.
        """
        found, rest = self._scratch.arrays(len(stream))
        np.take(stream, self._word, axis=1, out=rest, mode="wrap")  # what wraps around is masked
        np.right_shift(rest, self._left, out=found)
        rest <<= self._right
        found[:, :-1] |= rest[:, 1:]
        found &= self._mask
        table = words.reshape(-1, *self._shape)
        for width, rows, places in zip(self._widths, pairwise(self._rows), pairwise(self._words), strict=True):
            target = table[:, slice(*rows), : 2 * width]
            with_next = found[:, slice(*places)].reshape(len(found), -1, width + 1).view(np.int32)
            target[:] = with_next[:, :, : target.shape[2]]
        return not self._in_last or not (stream[:, -1] >> np.uint64(self._in_last)).any()


class PlainUnpacking:
    """From the words of heads of this geometry as they are (version 1) to their words; attributes as above."""

    def __init__(self, geometry: Geometry) -> None:
        words_per_head = math.prod(words_shape(geometry))
        self.size = 4 * words_per_head
        self.most = max(1, WORDS_AT_A_TIME // words_per_head)
        self._future = ~pack_bits(causal_blocks(geometry, "cpu")).flatten().numpy()

    def unpack(self, stream: Stream, words: Words) -> bool:
        """Copies [heads, M · W]; returns whether no bit in the causal future or past the end is set."""
        words[:] = stream.view(np.int32)[:, : words.shape[1]]
        return not (words & self._future).any()


class _Scratch:
    """Two arrays of rows of ``size`` words for each thread; kept, since fresh pages cost more than the work in them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = threading.local()

    def arrays(self, rows: int) -> tuple[Stream, Stream]:
        """[rows, size] each, of anything; the thread's next call has them again."""
        pair = getattr(self._memory, "pair", None)
        if pair is None or pair.shape[1] < rows:
            pair = self._memory.pair = np.empty((2, rows, self._size), np.uint64)
        return pair[0, :rows], pair[1, :rows]


def _rows_in_stream(geometry: Geometry) -> tuple[Numbers, Numbers, Numbers]:
    """The stream's word and the bit in it where each row starts, and how many bits it has: [M] each."""
    visible = visible_blocks(geometry, "cpu").numpy().astype(np.int64)
    return *np.divmod(visible.cumsum() - visible, STREAM_BITS), visible


def _words_for(bits: Numbers) -> Numbers:
    """How many words of a stream hold so many bits."""
    return -(-bits // STREAM_BITS)


def _numbered(counts: Numbers) -> tuple[Numbers, Numbers]:
    """Of things of which row I has counts[I]: each one's row, and its number in the row."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - (counts.cumsum() - counts)[row]


def _shifts(start: Numbers) -> tuple[Stream, Stream]:
    """By how much what starts at these bits of words is shifted to them, and to them from the words after."""
    return start.astype(np.uint64), (STREAM_BITS - start).astype(np.uint64)


def _low_bits(count: Numbers) -> Stream:
    """Words whose first ``count`` bits are set, at least none and at most all."""
    return np.uint64(2**64 - 1) >> (STREAM_BITS - count.clip(0, STREAM_BITS)).astype(np.uint64)


def even_step(heads: int, most: int) -> int:
    """Heads to take at a time so that all steps but the last are equal and none is above ``most``."""
    return ceil_div(heads, ceil_div(heads, most))


def as_stream_words(streams: NDArray[np.uint8]) -> Stream:
    """Bytes of streams [heads, size] as words, zero bits after each: the same memory if it has no need of these."""
    missing = -streams.shape[1] % (STREAM_BITS // 8)
    return (np.pad(streams, ((0, 0), (0, missing))) if missing else streams).view(np.uint64)
