from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gives_score(j, position, start, end, sliding_window, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr):
    """Whether a row gives a score to block j: it sees all keys of it that are of its own sequence (FIRST_KEY: one)."""
    own_first = tl.maximum(j * BLOCK, start)
    own_last = tl.minimum((j + 1) * BLOCK, end) - 1
    nearest = own_first if FIRST_KEY else own_last
    farthest = (own_last if FIRST_KEY else own_first) + sliding_window - 1
    return (own_first <= own_last) & (position >= nearest) & (position <= farthest)


@triton.jit
def is_scored(j, scored, rows_seen, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr, CUT: tl.constexpr):
    """Which blocks j have a score from a query block; all arguments broadcast against each other.

    CUT: blocks before the first row's own position are seen by its sequence's rows alone, and about the next two, in
    which sequences may start and end, something is said that was found row by row.
    """
    are_scored = j < scored
    if CUT:
        low, first_row, last, start, end, sliding_window, here, behind = rows_seen
        own_first = tl.maximum(j * BLOCK, start)
        own_last = tl.minimum((j + 1) * BLOCK, end) - 1
        nearest = own_first if FIRST_KEY else own_last
        farthest = (own_last if FIRST_KEY else own_first) + sliding_window - 1
        before = (own_first <= own_last) & (tl.maximum(nearest, first_row) <= tl.minimum(farthest, last))
        are_scored = are_scored & (((j < low) & before) | ((j == low) & here) | ((j == low + 1) & behind))
    return are_scored


@triton.jit
def any_row(flags, QUERY_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a flag of the rows [rows] is set in each query block: [QUERY_BLOCKS]."""
    return tl.max(tl.reshape(flags.to(tl.int32), [QUERY_BLOCKS, BLOCK]), 1) > 0


@triton.jit
def rows_of_block(j, I, last, rows_own, blocks, BLOCK: tl.constexpr, FIRST_KEY: tl.constexpr):
    """Whether each row gives a score to its block j, and whether it keeps it whatever the scores are; all [rows]."""
    position, start, end, sliding_window, offset = rows_own
    sink, window, last_full = blocks
    scores = gives_score(j, position, start, end, sliding_window, BLOCK, FIRST_KEY)
    first_seen = tl.maximum(tl.maximum(j * BLOCK, start), position - sliding_window + 1)
    sees = first_seen < tl.minimum(tl.minimum((j + 1) * BLOCK, end), position + 1)
    last_own = tl.minimum(last, end - 1)
    last_rows = I * BLOCK + last_full * BLOCK > end - 1 - offset
    return scores, sees & ((j < start // BLOCK + sink) | (j > last_own // BLOCK - window) | last_rows)
