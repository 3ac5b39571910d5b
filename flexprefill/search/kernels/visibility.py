"""What the rows of a tile of query blocks see: the blocks that they score, and those that they keep anyway.

A whole causal prompt needs only the first half of this file. The second half is for sequences and sliding windows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Fixed(NamedTuple):
    """What a tile is compiled for: the arguments of search_kernel in capitals, and SEVERAL."""

    D: Any
    D_PAD: Any
    BLOCK: Any
    QUERY_BLOCKS: Any
    TILE: Any
    D_STEP: Any
    WORDS: Any
    MEMBERS: Any
    FIRST_KEY: Any
    CUT: Any
    SEQUENCES: Any
    SOFT_CAP: Any
    ALIBI: Any
    ALPHAS: Any
    SEVERAL: Any  # whether the tile's rows are of several sequences


class PromptSizes(NamedTuple):
    """A call's lengths."""

    q_len: Any
    kv_len: Any
    offset: Any  # position of the first query
    rows: Any  # query blocks
    columns: Any  # key blocks


class BlockRule(NamedTuple):
    """The blocks that a query block keeps whatever their scores are."""

    sink_blocks: Any
    window_blocks: Any
    last_full_blocks: Any


class Cuts(NamedTuple):
    """What cuts the keys that rows see."""

    starts_ptr: Any  # of each position's sequence, in one batch entry after the other
    ends_ptr: Any
    sequence_stride: Any  # of the batch entries
    sliding_window: Any


class OneSequence(NamedTuple):
    """A sequence's first position and its end."""

    start: Any
    end: Any


class Queries(NamedTuple):
    """The rows of a tile of query blocks."""

    row: Any  # [rows]
    position: Any  # [rows]
    starts_ptr: Any  # of each position's sequence, in the rows' batch entry
    ends_ptr: Any
    start: Any  # of the first row's sequence
    end: Any
    starts_from: Any  # the first block in which the others may start
    sliding_window: Any  # keys that a row sees
    first_scored: Any  # the first block to which the row gives a score, [rows]; a number where they are of one sequence
    scored: Any  # and to how many it does


class Bounds(NamedTuple):
    """What a tile of query blocks sees, scores and keeps, [query blocks] each."""

    I: Any  # the query blocks
    visible: Any  # the blocks that the last row sees are those before it
    window_start: Any  # the first block of the window; 0 where all is kept
    scored: Any  # the blocks with a score are before it; 0 where all is kept whatever the scores
    base: Any  # the block whose largest score the sums are relative to
    most: Any  # the largest of scored, a number
    first_tile: Any  # the first block with a score, a number: tiles begin with it
    edges: Any  # Edges, 0 where rows are not cut


class Edges(NamedTuple):
    """What else is known of each query block where rows are cut, [query blocks] each.

    Only rows of the first row's sequence see blocks before the first row's position. In the next two blocks sequences
    may start and end. What a query block scores and keeps there was found row by row.
    """

    low: Any  # the block of the first row's position
    lowest: Any  # the first block that the first row sees
    sinks_end: Any
    first_row: Any  # its position
    last: Any  # the last row's position
    first_start: Any  # of the first row's sequence
    first_end: Any
    sliding_window: Any
    here: Any  # whether block low has a score
    here_kept: Any  # and whether it is kept whatever the score is
    behind: Any  # the same of block low + 1
    behind_kept: Any


@triton.jit
def whole_prompt(I, row, prompt, rule, cuts, fixed):
    """The Queries and Bounds of query blocks I and their rows, where every row sees all keys up to its own."""
    position = row + prompt.offset
    last = prompt.offset + tl.minimum((I + 1) * fixed.BLOCK, prompt.q_len) - 1
    visible = last // fixed.BLOCK + 1
    all_kept = (I >= prompt.rows - rule.last_full_blocks) | (visible <= rule.sink_blocks)
    window_start = tl.where(all_kept, 0, visible - rule.window_blocks)
    compares = (I < prompt.rows) & (window_start > 0)
    # blocks that the last row sees; if not FIRST_KEY, sees whole
    seen = visible
    if not fixed.FIRST_KEY:
        seen = tl.where(last + 1 == prompt.kv_len, prompt.columns, (last + 1) // fixed.BLOCK)
    scored = tl.where(compares, seen, 0)
    base = tl.zeros([fixed.QUERY_BLOCKS], tl.int32)
    queries = Queries(row, position, 0, 0, 0, prompt.kv_len, prompt.columns, cuts.sliding_window, 0, 0)
    return queries, Bounds(I, visible, window_start, scored, base, tl.max(scored, 0), 0, 0)


@triton.jit
def unmasked_end(I0, queries, bounds, prompt, fixed):
    """The end of the tiles, from the first, of blocks that every row sees whole."""
    whole = (prompt.offset + I0 * fixed.BLOCK + 1) // fixed.BLOCK
    unmasked = bounds.first_tile + (whole - bounds.first_tile) // fixed.TILE * fixed.TILE
    if prompt.q_len < (I0 + fixed.QUERY_BLOCKS) * fixed.BLOCK:
        unmasked = 0
    if fixed.SEVERAL:
        unmasked = 0
    elif fixed.CUT:
        # the far edge of a row's window, or the start of the sequence, may lie behind the first tile
        end = prompt.offset + (I0 + fixed.QUERY_BLOCKS) * fixed.BLOCK
        farthest = tl.maximum(queries.start, end - queries.sliding_window)
        if farthest > (bounds.first_tile + fixed.TILE) * fixed.BLOCK:
            unmasked = 0
    return unmasked


@triton.jit
def sees_block(j, queries, prompt, fixed):
    """Whether each row sees all of block j (FIRST_KEY: its first key) and so gives it a score: [J, rows]."""
    if fixed.SEVERAL:
        sees = _is_among(j[:, None], queries.first_scored[None, :], queries.scored[None, :])
    elif fixed.CUT:
        start, end, sliding_window = queries.start, queries.end, queries.sliding_window
        own_first, own_last, nearest, farthest = _scoring_positions(j, start, end, sliding_window, fixed)
        # rows behind the end give no score
        count = tl.maximum(tl.minimum(farthest, prompt.kv_len - 1) - nearest + 1, 0)
        if fixed.SEQUENCES:
            count = tl.where(own_first <= own_last, count, 0)
        sees = _is_among(queries.position[None, :], nearest[:, None], count[:, None])
    else:
        needed = j * fixed.BLOCK if fixed.FIRST_KEY else tl.minimum((j + 1) * fixed.BLOCK, prompt.kv_len) - 1
        first_to_see = needed - prompt.offset
        sees = (queries.row[None, :] >= first_to_see[:, None]) & (queries.row[None, :] < prompt.q_len)
    return sees


@triton.jit
def _is_among(x, first, count):
    """Whether x is one of ``count`` numbers from ``first`` on."""
    # in one comparison: what is before them wraps to a huge number
    return (x - first).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def is_scored(j, bounds, fixed):
    """Which blocks j have a score from a query block. j is of a tile [J, 1] or of words [1, words, 32]."""
    scored = j < _beside(bounds.scored, j)
    if fixed.CUT:
        scored = scored & _is_inside(j, bounds.edges, fixed)
    return scored


@triton.jit
def is_kept(j, chosen, bounds, rule, fixed):
    """Which blocks j [1, words, 32] a query block keeps: those chosen by score, and others whatever their scores."""
    if fixed.CUT:
        kept = _is_kept_inside(j, chosen, bounds)
    else:
        seen = j < _beside(bounds.visible, j)
        kept = seen & (chosen | (j < rule.sink_blocks) | (j >= _beside(bounds.window_start, j)))
    return kept


@triton.jit
def _beside(values, j):
    """Values [query blocks] in the shape that goes with blocks j."""
    return values[None, :] if len(j.shape) == 2 else values[:, None, None]


@triton.jit
def sequence_at(I0, row, batch, prompt, cuts, fixed):
    """The sequence of the first row of query blocks from I0, and whether the rows are of several.

    One sequence for all rows does not lie in a block alone: the rows fill a block, or the sequence ends with the keys.
    """
    base = batch * cuts.sequence_stride
    first = prompt.offset + I0 * fixed.BLOCK
    start, end = tl.load(cuts.starts_ptr + base + first), tl.load(cuts.ends_ptr + base + first)
    inside = row < prompt.q_len
    starts = tl.load(cuts.starts_ptr + base + prompt.offset + row, mask=inside, other=start)
    return OneSequence(start, end), tl.max((starts != start).to(tl.int32), 0) > 0


@triton.jit
def cut_prompt(I0, I, row, batch, sequence, prompt, rule, cuts, fixed):
    """As whole_prompt, for query blocks from I0 whose rows see their own sequence in their window.

    Without SEVERAL they are all of the one ``sequence``.
    """
    BLOCK: tl.constexpr = fixed.BLOCK
    position = row + prompt.offset
    last = prompt.offset + tl.minimum((I + 1) * BLOCK, prompt.q_len) - 1
    visible = last // BLOCK + 1
    first_row = prompt.offset + I * BLOCK
    queries = _queries_of(I0, row, position, batch, sequence, prompt, cuts, fixed)
    first_start, first_end = _sequence_of(I < prompt.rows, first_row, queries, prompt, fixed)
    # only rows of the first row's own sequence see blocks before the first row's
    low = first_row // BLOCK
    inside = first_start < first_end
    far_edge = first_row - cuts.sliding_window + 1
    lowest = tl.where(inside, tl.maximum(first_start, far_edge) // BLOCK, low)
    # the first block to which the first row gives a score
    base = lowest
    if not fixed.FIRST_KEY:
        base = tl.where(first_start < far_edge, (far_edge + BLOCK - 1) // BLOCK, first_start // BLOCK)
    own_visible = tl.where(inside, tl.minimum(last, first_end - 1) // BLOCK + 1, 0)
    sinks_end = first_start // BLOCK + rule.sink_blocks
    last_rows = (tl.maximum(first_end - prompt.offset, 0) + BLOCK - 1) // BLOCK
    all_kept = (I >= last_rows - rule.last_full_blocks) | (own_visible <= sinks_end)
    window_start = tl.where(all_kept, 0, own_visible - rule.window_blocks)
    if fixed.SEVERAL:
        I_of_row = I0 + tl.arange(0, fixed.QUERY_BLOCKS * BLOCK) // BLOCK
        low_of_row = (prompt.offset + I_of_row * BLOCK) // BLOCK
        here, here_kept = _row_by_row(low_of_row, I_of_row, queries, prompt, rule, fixed)
        behind, behind_kept = _row_by_row(low_of_row + 1, I_of_row, queries, prompt, rule, fixed)
    else:
        rows, own, always = (first_row, last), (first_start, first_end), (sinks_end, window_start)
        here, here_kept = _of_one_sequence(low, rows, own, always, cuts.sliding_window, fixed)
        behind, behind_kept = _of_one_sequence(low + 1, rows, own, always, cuts.sliding_window, fixed)
    compares = (tl.minimum(window_start, low) > lowest) | (here & (here_kept == 0))
    compares = (I < prompt.rows) & (compares | (behind & (behind_kept == 0)))
    scored = tl.where(compares, visible, 0)
    most = tl.max(scored, 0)
    first_tile = tl.min(tl.where(compares, lowest, most), 0)
    edges = Edges(
        low, lowest, sinks_end, first_row, last, first_start, first_end, cuts.sliding_window,
        here, here_kept, behind, behind_kept,
    )  # fmt: skip
    return queries, Bounds(I, visible, window_start, scored, base, most, first_tile, edges)


@triton.jit
def _sequence_of(inside, position, queries, prompt, fixed):
    """Start and end of the sequences at positions. Where not inside, those of no sequence."""
    if fixed.SEVERAL:
        start = tl.load(queries.starts_ptr + position, mask=inside, other=prompt.kv_len)
        end = tl.load(queries.ends_ptr + position, mask=inside, other=0)
    else:
        start = tl.where(inside, queries.start, prompt.kv_len)
        end = tl.where(inside, queries.end, 0)
    return start, end


@triton.jit
def sequences_of(queries, prompt, fixed):
    """Start and end of each row's sequence, [rows]. They are read where they are needed, for they take registers.

    For SEVERAL alone: elsewhere they are those of the Queries.
    """
    return _sequence_of(queries.row < prompt.q_len, queries.position, queries, prompt, fixed)


@triton.jit
def _queries_of(I0, row, position, batch, sequence, prompt, cuts, fixed):
    """The Queries of a tile's rows, from query block I0."""
    starts, ends = cuts.starts_ptr + batch * cuts.sequence_stride, cuts.ends_ptr + batch * cuts.sequence_stride
    start, end, sliding_window = sequence.start, sequence.end, cuts.sliding_window
    queries = Queries(row, position, starts, ends, start, end, prompt.columns, sliding_window, 0, 0)
    if fixed.SEVERAL:
        starts_from = (prompt.offset + I0 * fixed.BLOCK) // fixed.BLOCK
        first_scored, scored = _blocks_scored(position, *sequences_of(queries, prompt, fixed), sliding_window, fixed)
        queries = Queries(
            row, position, starts, ends, start, end, starts_from, sliding_window, first_scored, scored
        )  # fmt: skip
    return queries


@triton.jit
def _blocks_scored(position, start, end, sliding_window, fixed):
    """The first block to which each row gives a score, and to how many it does: they stand in a row."""
    far_edge = position - sliding_window + 1
    first = tl.maximum(start, far_edge) // fixed.BLOCK
    last = position // fixed.BLOCK
    if not fixed.FIRST_KEY:
        first = tl.where(start < far_edge, (far_edge + fixed.BLOCK - 1) // fixed.BLOCK, first)
        last = tl.where(position + 1 < end, (position + 1) // fixed.BLOCK - 1, last)
    return first, tl.where(start < end, tl.maximum(last - first + 1, 0), 0)


@triton.jit
def _of_one_sequence(j, rows, sequence, always, sliding_window, fixed):
    """Whether each query block's block j gets a score, and whether it is kept anyway: [query blocks] both.

    All of a query block's rows, first and last position, are of one sequence, start and end. Blocks before the first of
    always and from the second on are kept if a row sees them.
    """
    first_row, last = rows
    start, end = sequence
    sinks_end, window_start = always
    scores = _some_row_scores(j, first_row, last, start, end, sliding_window, fixed)
    first_key, end_key = tl.maximum(j * fixed.BLOCK, start), tl.minimum((j + 1) * fixed.BLOCK, end)
    sees = tl.maximum(first_key, first_row) <= tl.minimum(end_key + sliding_window - 2, last)
    kept = (first_key < end_key) & sees & ((j < sinks_end) | (j >= window_start))
    return scores, kept


@triton.jit
def _some_row_scores(j, first_row, last, start, end, sliding_window, fixed):
    """Whether some position from first_row to last, all of one sequence, gives a score to block j."""
    own_first, own_last, nearest, farthest = _scoring_positions(j, start, end, sliding_window, fixed)
    return (own_first <= own_last) & (tl.maximum(nearest, first_row) <= tl.minimum(farthest, last))


@triton.jit
def _row_by_row(j, I, queries, prompt, rule, fixed):
    """Whether each query block's block j, [rows], gets a score, and whether it is kept anyway: [query blocks] both."""
    BLOCK: tl.constexpr = fixed.BLOCK
    position = queries.position
    start, end = sequences_of(queries, prompt, fixed)
    last = prompt.offset + tl.minimum((I + 1) * BLOCK, prompt.q_len) - 1
    scores = _is_among(j, queries.first_scored, queries.scored)
    first_seen = tl.maximum(tl.maximum(j * BLOCK, start), position - queries.sliding_window + 1)
    sees = first_seen < tl.minimum(tl.minimum((j + 1) * BLOCK, end), position + 1)
    last_own = tl.minimum(last, end - 1)
    last_rows = I * BLOCK + rule.last_full_blocks * BLOCK > end - 1 - prompt.offset
    kept = sees & ((j < start // BLOCK + rule.sink_blocks) | (j > last_own // BLOCK - rule.window_blocks) | last_rows)
    return _any_row(scores, fixed), _any_row(kept, fixed)


@triton.jit
def _any_row(flags, fixed):
    """Whether a flag of the rows [rows] is set in each query block: [query blocks]."""
    return tl.max(tl.reshape(flags.to(tl.int32), [fixed.QUERY_BLOCKS, fixed.BLOCK]), 1) > 0


@triton.jit
def _scoring_positions(j, start, end, sliding_window, fixed):
    """A sequence's first and last key in block j, and the first and last position that give the block a score."""
    own_first = tl.maximum(j * fixed.BLOCK, start)
    own_last = tl.minimum((j + 1) * fixed.BLOCK, end) - 1
    nearest = own_first if fixed.FIRST_KEY else own_last
    farthest = (own_last if fixed.FIRST_KEY else own_first) + sliding_window - 1
    return own_first, own_last, nearest, farthest


@triton.jit
def _is_inside(j, edges, fixed):
    """Whether some row of a query block gives a score to block j, if any block has one."""
    start, end = _beside(edges.first_start, j), _beside(edges.first_end, j)
    first_row, last, low = _beside(edges.first_row, j), _beside(edges.last, j), _beside(edges.low, j)
    before = _some_row_scores(j, first_row, last, start, end, edges.sliding_window, fixed)
    here, behind = _beside(edges.here, j), _beside(edges.behind, j)
    return ((j < low) & before) | ((j == low) & here) | ((j == low + 1) & behind)


@triton.jit
def _is_kept_inside(j, chosen, bounds):
    """As is_kept, where rows are cut."""
    edges = bounds.edges
    low = _beside(edges.low, j)
    always = (j < _beside(edges.sinks_end, j)) | (j >= _beside(bounds.window_start, j))
    kept = (j >= _beside(edges.lowest, j)) & (j < low) & (chosen | always)
    kept = kept | ((j == low) & (chosen | _beside(edges.here_kept, j)))
    return kept | ((j == low + 1) & (chosen | _beside(edges.behind_kept, j)))
