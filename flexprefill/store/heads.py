"""How heads' words become bytes of a file, and back. In NumPy: torch's own threads cost more than they give here."""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import NDArray

from flexprefill.blockmap import WORD_BITS, causal_blocks, ceil_div, pack_bits, visible_blocks

RUNS = 2**19  # at a time: some megabytes, which stay in the cache


def words_shape(q_len: int, kv_len: int, block_size: int) -> tuple[int, int]:
    """(M, W): rows of a head, and words in a row."""
    return ceil_div(q_len, block_size), ceil_div(ceil_div(kv_len, block_size), WORD_BITS)


def triangle_bits(q_len: int, kv_len: int, block_size: int) -> int:
    """The sum of :func:`visible_blocks`, in constant time whatever the sizes are."""
    rows, columns = ceil_div(q_len, block_size), ceil_div(kv_len, block_size)
    before = ceil_div(kv_len - q_len, block_size)  # row I < rows - 1 sees before + I + 1 blocks, the last row all
    return (rows - 1) * before + rows * (rows - 1) // 2 + columns


def triangle_bytes(q_len: int, kv_len: int, block_size: int) -> int:
    """Bytes of a head's stream: its visible blocks, row after row, a bit each; zero bits fill the last byte."""
    return ceil_div(triangle_bits(q_len, kv_len, block_size), 8)


class TrianglePacking:
    """From the words of heads of these sizes to their streams.

    Attributes:
        words: M · W.
        bits: blocks in a head's stream.
        size: bytes of a head's stream.
        most: heads to pack at a time, for :func:`even_step`.
    """

    def __init__(self, q_len: int, kv_len: int, block_size: int) -> None:
        width = words_shape(q_len, kv_len, block_size)[1]
        self.words = math.prod(words_shape(q_len, kv_len, block_size))
        self.bits = triangle_bits(q_len, kv_len, block_size)
        self.size = ceil_div(self.bits, 8)
        first, visible = _rows_in_stream(q_len, kv_len, block_size)

        def runs(row: NDArray[np.int64], bit: NDArray[np.int64]) -> _Runs:
            """From these bits of the stream, in these rows, to the end of the stream's word or of the row."""
            in_row = bit - first[row]
            length = np.minimum(visible[row] - in_row, WORD_BITS - bit % WORD_BITS)
            return _Runs(row * (width * WORD_BITS) + in_row, length, self.words)

        # what each word of the stream starts with, and then what each row that starts inside a word adds to it
        edge = WORD_BITS * np.arange(ceil_div(self.bits, WORD_BITS))
        self._at_edges = runs(np.searchsorted(first, edge, side="right") - 1, edge)
        row = (first % WORD_BITS).nonzero()[0]
        self._inside = runs(row, first[row]) if len(row) else None
        self._shift = first[row] % WORD_BITS
        self._place, self._first_there = np.unique(first[row] // WORD_BITS, return_index=True)
        self.most = max(1, RUNS // len(edge))

    def pack(self, words: NDArray[np.int32], stream: NDArray[np.int32]) -> None:
        """Writes the streams of [heads, M · W] to [heads, size / 4 rounded up], zero bits after each."""
        packed = self._at_edges.read(words)
        if self._inside is not None:
            inside = self._inside.read(words)
            inside <<= self._shift
            packed[:, self._place] |= np.bitwise_or.reduceat(inside, self._first_there, axis=1)
        np.copyto(stream, packed, casting="unsafe")  # the lower half


class TriangleUnpacking:
    """From the streams of heads of these sizes to their words.

    Attributes:
        size: bytes of a head's stream.
        most: heads to unpack at a time, for :func:`even_step`.
    """

    def __init__(self, q_len: int, kv_len: int, block_size: int) -> None:
        self._bits = triangle_bits(q_len, kv_len, block_size)
        self.size = ceil_div(self._bits, 8)
        first, visible = _rows_in_stream(q_len, kv_len, block_size)
        self._shape = words_shape(q_len, kv_len, block_size)
        column = WORD_BITS * np.arange(self._shape[1])
        length = (visible[:, None] - column).clip(0, WORD_BITS)
        seen = length > 0
        self._runs = _Runs((first[:, None] + column)[seen], length[seen], ceil_div(self._bits, WORD_BITS))
        self.most = max(1, RUNS // int(seen.sum()))
        # rows that see equally many words follow each other: their first one, that number, and their first run
        self._widths, self._row = np.unique(seen.sum(1), return_index=True)
        self._run = (seen.sum(1).cumsum() - seen.sum(1))[self._row]

    def unpack(self, stream: NDArray[np.int32], words: NDArray[np.int32]) -> bool:
        """Writes the words of [heads, size / 4 rounded up] to [heads, M · W], which is zero before.

        Returns:
            whether no bit after a last block is set.
        """
        runs = self._runs.read(stream)
        table = words.reshape(-1, *self._shape)
        row_ends, run_ends = [*self._row[1:], self._shape[0]], [*self._run[1:], runs.shape[1]]
        for width, row, row_end, run, run_end in zip(
            self._widths, self._row, row_ends, self._run, run_ends, strict=True
        ):
            table[:, row:row_end, :width] = runs[:, run:run_end].reshape(len(runs), -1, width)
        in_last = self._bits % WORD_BITS
        return not in_last or not (stream[:, -1].view(np.uint32) >> in_last).any()


class PlainUnpacking:
    """From the words of heads of these sizes as they are (version 1) to their words; attributes as above."""

    def __init__(self, q_len: int, kv_len: int, block_size: int) -> None:
        words = math.prod(words_shape(q_len, kv_len, block_size))
        self.size = 4 * words
        self.most = max(1, RUNS // words)
        self._future = ~pack_bits(causal_blocks(q_len, kv_len, block_size, "cpu")).flatten().numpy()

    def unpack(self, stream: NDArray[np.int32], words: NDArray[np.int32]) -> bool:
        """Copies [heads, M · W]; returns whether no bit in the causal future or past the end is set."""
        words[:] = stream
        return not (words & self._future).any()


class _Runs:
    """Runs of 1 … 32 bits that start at any bit of rows of ``words`` int32 words."""

    def __init__(self, start: NDArray[np.int64], length: NDArray[np.int64], words: int) -> None:
        word = start // WORD_BITS
        self._pairs = np.stack([word, np.minimum(word + 1, words - 1)], 1).ravel()
        self._shift = start % WORD_BITS
        self._mask = (1 << length) - 1
        self._memory = threading.local()

    def read(self, words: NDArray[np.int32]) -> NDArray[np.int64]:
        """Each run's bits, from bit 0: [rows, runs] of [rows, words]. The thread's next call overwrites them."""
        if len(getattr(self._memory, "pairs", ())) < len(words):  # kept: fresh pages cost more than the work
            self._memory.pairs = np.empty((len(words), len(self._pairs)), np.int32)
        pairs = self._memory.pairs[: len(words)]
        np.take(words, self._pairs, axis=1, out=pairs, mode="wrap")  # the fastest mode; all are in range
        # two words hold any run, and the sign that a shift by at most 31 brings in is above the lower one
        runs = pairs.view(np.int64)
        runs >>= self._shift
        runs &= self._mask
        return runs


def _rows_in_stream(q_len: int, kv_len: int, block_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each row's first bit in the stream, and how many are its own: [M]."""
    visible = visible_blocks(q_len, kv_len, block_size, "cpu").numpy().astype(np.int64)
    return visible.cumsum() - visible, visible


def even_step(heads: int, most: int) -> int:
    """Heads to take at a time so that all steps but the last are equal and none is above ``most``."""
    return ceil_div(heads, ceil_div(heads, most))


def zero_streams(heads: int, size: int) -> tuple[list[memoryview], NDArray[np.int32]]:
    """Zeros for streams of ``size`` bytes: each one's bytes, and all as [heads, size / 4 rounded up]."""
    stream = np.zeros((heads, ceil_div(size, 4)), np.int32)
    return [memoryview(row)[:size] for row in stream.view(np.uint8)], stream
