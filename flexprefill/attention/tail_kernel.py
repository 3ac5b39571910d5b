"""The last query blocks in parts of their keys, in Triton: a map's words by part, and the merge of the parts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flexprefill.blockmap.bits_kernel import bits_below
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.runtime.launching import launch

PART_WORDS = 64  # a program
MERGED_ROWS = 16  # queries a program


@triton.jit(do_not_specialize="total rows first width columns share".split())
def split_words_kernel(
    words_ptr, others_ptr, out_ptr, total, rows, first, width, columns, share,
    PARTS: tl.constexpr, PART_WORDS: tl.constexpr,
):  # fmt: skip
    """Words [B * H, M, W]: a copy without the rows from ``first`` on, and these [B * H, PARTS, rows, W].

    Each part has its own columns' bits. The first ``total`` programs, B * H * M, copy.
    """
    program = tl.program_id(0)
    w = tl.program_id(1) * PART_WORDS + tl.arange(0, PART_WORDS)
    if program < total:
        row = program.to(tl.int64) * width
        words = tl.load(words_ptr + row + w, mask=(w < width) & (program % (first + rows) < first), other=0)
        tl.store(others_ptr + row + w, words, mask=w < width)
    else:
        place = program - total  # of a row in the output
        part = place // rows % PARTS
        head = (place // (rows * PARTS)).to(tl.int64)
        source = words_ptr + (head * (first + rows) + first + place % rows) * width
        words = tl.load(source + w, mask=w < width, other=0)
        # the last part has the last columns, which hold the causal edge
        end = columns - (PARTS - 1 - part) * share
        own = bits_below(end, w) & ~bits_below(end - share, w)
        tl.store(out_ptr + place.to(tl.int64) * width + w, words & own, mask=w < width)


def split_words(words: Tensor, first: int, columns: int, parts: int) -> tuple[Tensor, Tensor]:
    """A map's words [B, H, M, W] without the rows from ``first`` on, and these rows by parts of their columns.

    Returns:
        [B, H, M, W], in which the last rows keep nothing, and [B, H * parts, rows, W]. The last part has the last
        ceil(columns / parts) columns, the part before it those before, and so on.
    """
    words = words.contiguous()
    batch, heads, total, width = words.shape
    rows = total - first
    others, out = words.new_empty(words.shape), words.new_empty(batch, heads * parts, rows, width)
    grid = batch * heads * (total + parts * rows), ceil_div(width, PART_WORDS)
    launch(
        split_words_kernel, grid, words, others, out, batch * heads * total, rows, first, width, columns,
        ceil_div(columns, parts), PARTS=parts, PART_WORDS=PART_WORDS, num_warps=1,
    )  # fmt: skip
    return others, out


@triton.jit(do_not_specialize="q_len padded parts_len length".split())
def merge_parts_kernel(
    parts_ptr, sums_ptr, output_ptr, lse_ptr, parts_b, parts_h, parts_s, output_b, output_h, output_s, HEADS, q_len,
    padded, parts_len, length, PARTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MERGED_ROWS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Outputs of parts [B, H, parts_len, D], merged by their log-sum-exps into output [B, H, q_len, D].

    A part begins at each multiple of padded. The last ``length`` rows of output are written.
    """
    row = tl.program_id(0) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D_PAD)
    inside = row < length
    mask = inside[:, None] & (d[None, :] < D)
    sums = sums_ptr + head * parts_len + row
    most = tl.full([MERGED_ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        most = tl.maximum(most, tl.load(sums + part * padded, mask=inside, other=0.0), tl.PropagateNan.ALL)
    shift = tl.where(most == float("-inf"), 0.0, most)  # a row that keeps nothing is zero
    total = tl.zeros([MERGED_ROWS], tl.float32)
    merged = tl.zeros([MERGED_ROWS, D_PAD], tl.float32)
    base = parts_ptr + (head // HEADS) * parts_b + (head % HEADS) * parts_h
    for part in tl.static_range(PARTS):
        weight = tl.exp(tl.load(sums + part * padded, mask=inside, other=0.0) - shift)
        rows = base + (part * padded + row).to(tl.int64)[:, None] * parts_s
        merged += weight[:, None] * tl.load(rows + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += weight
    merged = merged / tl.where(total == 0, 1.0, total)[:, None]
    position = (q_len - length + row).to(tl.int64)
    target = output_ptr + (head // HEADS) * output_b + (head % HEADS) * output_h + position[:, None] * output_s
    tl.store(target + d[None, :], merged.to(output_ptr.dtype.element_ty), mask=mask)
    if LSE:
        tl.store(lse_ptr + head * q_len + position, shift + tl.log(total), mask=inside)


def merge_parts(outputs: Tensor, sums: Tensor, parts: int, output: Tensor, lse: Tensor | None, length: int) -> None:
    """Merges the outputs of parts of the keys into the last rows of an output, and of its log-sum-exp if there is one.

    Args:
        outputs: [B, Hq, (parts - 1) * padded + length, Dv], part by part, at least two.
        sums: Their log-sum-exps, [B, Hq, (parts - 1) * padded + length].
        output: [B, Hq, S_q, Dv]. Its last ``length`` rows are written.
        lse: [B, Hq, S_q]. Its last ``length`` rows are written.
    """
    batch, heads, q_len, value_dim = output.shape
    sums = sums.contiguous()
    launch(
        merge_parts_kernel, (ceil_div(length, MERGED_ROWS), batch * heads), outputs, sums, output,
        sums if lse is None else lse, *outputs.stride()[:3], *output.stride()[:3], heads, q_len,
        (outputs.shape[2] - length) // (parts - 1), outputs.shape[2], length, PARTS=parts, D=value_dim,
        D_PAD=triton.next_power_of_2(value_dim), MERGED_ROWS=MERGED_ROWS, LSE=lse is not None, num_warps=4,
    )  # fmt: skip
