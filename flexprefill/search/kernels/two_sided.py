"""Launches the kernels of the two-sided search."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexprefill.blockmap.bits import WORD_BITS
from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.runtime.devices import multiprocessors
from flexprefill.runtime.launching import launch
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.search.kernels.farthest import farthest
from flexprefill.search.kernels.launch import SMALLEST_SCALE, hopper_copies
from flexprefill.search.kernels.outliers import outliers_kernel
from flexprefill.search.kernels.probes import SEGMENT, TILE_ROWS, decide_kernel, masses_kernel
from flexprefill.search.rule import Rule
from flexprefill.search.two_sided import FULL_SIGHT, NEIGHBOURS, SIGHT_STEP
from flexprefill.variant.logits import LOG2_E

SCRATCH_BYTES = 2**27  # of the probes' kernels, at a time
PROGRAMS = 2  # of the masses' kernel, a multiprocessor
PROGRAMS_A_PLACE = 4  # of those, one after the other, at least
LARGEST_SPAN_LOG2 = 3  # segments of a program
PROBE_WARPS, PROBE_STAGES, DECIDE_WARPS = 8, 2, 4
OUTLIER_WARPS, OUTLIER_STAGES = 4, 2
OUTLIER_REGISTERS = 168
D_STEP = 32  # of the head dimension, a product, where all of it takes too much shared memory


def keep_more(
    query: Tensor, key: Tensor, outliers: Tensor | None, words: Tensor | None, rule: Rule, measured: bool
) -> tuple[Tensor, Tensor | None]:
    """As two_sided.keep_more. ``words`` are overwritten."""
    if not query.is_cuda:
        # the interpreter's dot is wrong for bfloat16; products of bfloat16 are exact in float32
        query, key = query.float(), key.float()
        outliers = None if outliers is None else outliers.float()
    if rule.scale < 0:
        # the kernels take a factor out of maxima
        query, rule = -query, rule._replace(scale=-rule.scale)
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    geometry = Geometry(q_len, kv_len, rule.block_size)
    width = ceil_div(geometry.columns, WORD_BITS)
    found = words is not None
    if words is None:
        with room_for("the search", 4 * batch * heads * geometry.rows * width, query.device, IN_CHUNKS):
            words = torch.empty(batch, heads, geometry.rows, width, dtype=torch.int32, device=query.device)
    shared = {
        "words_ptr": words, "q_len": q_len, "kv_len": kv_len, "rows": geometry.rows, "width": width, "HEADS": heads,
        "GROUP": heads // key.shape[1], "sink_blocks": rule.sink_blocks,
        "window_blocks": rule.window_blocks, "last_full_blocks": rule.last_full_blocks, "D": query.shape[3],
        # not 0: times a hidden product's -inf it would be NaN
        "qk_scale": max(rule.scale * LOG2_E, SMALLEST_SCALE),
    }  # fmt: skip
    far = None
    if outliers is not None:
        far = _look_at(outliers, query, key, found, rule, shared)
        found = True
    if not rule.probe_rows:
        return words, None
    held = torch.empty(batch, heads, geometry.rows, dtype=torch.float32, device=query.device) if measured else None
    _probe(query, key, far, words, held, found, rule, shared)
    return words, held


def _look_at(
    outliers: Tensor, query: Tensor, key: Tensor, found: bool, rule: Rule, shared: dict[str, Any]
) -> Tensor | None:
    """Launches the outliers' kernel. Where that picks the farthest rows of query blocks too, it returns them."""
    tiles = shared["rows"] * query.shape[0] * query.shape[1]
    log2_share = math.log2(rule.outlier_share)
    arguments = {"tiles": tiles, "log2_share": log2_share, "COUNT": outliers.shape[3], "FOUND": found, **shared}
    if hopper_takes_outliers(query, key, rule):
        from flexprefill.search.kernels import hopper_outliers  # imports triton's Gluon

        query_blocks, keys, vectors = hopper_outliers.describe(query, key, outliers)
        programs = min(tiles, hopper_outliers.programs(outliers) * multiprocessors(query.device))
        far, far_blocks = None, _far_blocks(query, key, rule)
        if far_blocks:
            shape = *query.shape[:2], shared["rows"], rule.probe_rows // 2
            far = torch.empty(shape, dtype=torch.int32, device=query.device)
        launch(
            hopper_outliers.outliers_kernel, (programs,), query=query_blocks, key=keys, outliers=vectors,
            far_ptr=shared["words_ptr"] if far is None else far, far_blocks=far_blocks,
            FAR=0 if far is None else far.shape[3], num_warps=hopper_outliers.warps(outliers),
            maxnreg=hopper_outliers.REGISTERS, **arguments,
        )  # fmt: skip
        return far
    launch(
        outliers_kernel, (tiles,), outliers_ptr=outliers, columns=outliers.shape[2], STAGES=OUTLIER_STAGES,
        num_warps=OUTLIER_WARPS, maxnreg=OUTLIER_REGISTERS if query.dtype != torch.float32 else None, **arguments,
        **_pointers("query", query), **_pointers("key", key), **_sizes(key, rule),
    )  # fmt: skip
    return None


def _far_blocks(query: Tensor, key: Tensor, rule: Rule) -> int:
    """Of how many query blocks the farthest rows are probed, the first ones. A single probe is an even one."""
    geometry = Geometry(query.shape[2], key.shape[2], rule.block_size)
    stretches = _stretches(geometry, rule, 1, 0, geometry.rows) if rule.probe_rows > 1 else ()
    return max((one.end for one in stretches if one.probes > 1), default=0)


def _probe(
    query: Tensor, key: Tensor, far: Tensor | None, words: Tensor, held: Tensor | None, found: bool, rule: Rule,
    shared: dict[str, Any],
) -> None:  # fmt: skip
    """Launches the probes' kernels, the one that weighs and the one that decides, for each band of the work."""
    group = query.shape[1] // key.shape[1]
    far_count = max(rule.probe_rows // 2, 1)
    geometry = Geometry(query.shape[2], key.shape[2], rule.block_size)
    members = min(triton.next_power_of_2(group), NEIGHBOURS)
    if far is None:
        with_far = _far_blocks(query, key, rule)
        far = farthest(query, rule.block_size, far_count, first_blocks=with_far) if with_far else words
    bands = list(_bands(geometry, rule, members, query.shape[0] * key.shape[1] * ceil_div(group, members)))
    needed = max(band.bytes for band in bands)
    with room_for("the search", needed, query.device, IN_CHUNKS):
        scratch = torch.empty(needed // 4, dtype=torch.float32, device=query.device)
    kernel, arguments = _masses_kernel(query, key, rule)
    sizes = {
        "scratch_ptr": scratch, "q_len": geometry.q_len, "kv_len": geometry.kv_len, "GROUP": group, "MEMBERS": members,
        "PROBES_LOG2": rule.probe_rows.bit_length() - 1,
    }  # fmt: skip
    places = PROGRAMS * multiprocessors(query.device)
    for band in bands:
        span_log2 = band.span_log2(places)
        sizes |= {"first": band.first, "end": band.end, "first_set": band.first_set, "sets": band.sets}
        launch(
            kernel, (band.programs(span_log2),), far_ptr=far, span_log2=span_log2, HEADS=query.shape[1],
            qk_scale=shared["qk_scale"], FAR=far_count, D=query.shape[3], **_pointers("query", query), **arguments,
            **sizes,
        )  # fmt: skip
        launch(
            decide_kernel, ((band.end - band.first) * band.sets,), words_ptr=words,
            held_ptr=words if held is None else held, rows=geometry.rows, width=words.shape[3],
            probe_share=rule.probe_share, sink_blocks=rule.sink_blocks, window_blocks=rule.window_blocks,
            last_full_blocks=rule.last_full_blocks, BLOCK=rule.block_size, FOUND=found, HELD=held is not None,
            num_warps=DECIDE_WARPS, **sizes,
        )  # fmt: skip


def _masses_kernel(query: Tensor, key: Tensor, rule: Rule) -> tuple[Any, dict[str, Any]]:
    """The masses' kernel of a search, and what it alone is told."""
    if not hopper_takes_probes(query, key, rule):
        options = {"STAGES": PROBE_STAGES, "num_warps": PROBE_WARPS}
        return masses_kernel, {**_pointers("key", key), **_sizes(key, rule), **options}
    from flexprefill.search.kernels import hopper_probes  # imports triton's Gluon

    options = {"num_warps": hopper_probes.WARPS, "maxnreg": hopper_probes.REGISTERS}
    return hopper_probes.masses_kernel, {"key": hopper_probes.describe_keys(key), **options}


def hopper_takes_outliers(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_outliers.outliers_kernel can do this search."""
    return hopper_copies(query) and hopper_copies(key) and rule.block_size == 128 and rule.scale >= SMALLEST_SCALE


def hopper_takes_probes(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_probes.masses_kernel can do this search."""
    members = min(triton.next_power_of_2(query.shape[1] // key.shape[1]), NEIGHBOURS)
    return hopper_copies(key) and rule.block_size == 128 and members * rule.probe_rows <= TILE_ROWS


def _sizes(key: Tensor, rule: Rule) -> dict[str, int]:
    """What the kernels that run anywhere are told besides."""
    head_pad = triton.next_power_of_2(key.shape[3])
    whole = key.dtype != torch.float32 and head_pad <= 128
    return {"D_PAD": head_pad, "D_STEP": head_pad if whole else min(head_pad, D_STEP), "BLOCK": rule.block_size}


def _pointers(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor and its strides, as kernels name them."""
    strides = zip("bhsd", tensor.stride(), strict=True)
    return {f"{name}_ptr": tensor, **{f"{name}_{axis}": stride for axis, stride in strides}}


class _Stretch(NamedTuple):
    """Neighbouring query blocks with as many probes each."""

    first: int
    end: int  # one behind the last
    probes: int
    tiles: int  # of a set of heads
    columns: int  # key blocks that they can see

    @property
    def segments(self) -> int:
        return ceil_div(self.columns, SEGMENT)

    @property
    def bytes(self) -> int:
        """Of scratch, for a set of heads: each row's mass of each key block and sum of each segment."""
        return 4 * TILE_ROWS * self.tiles * (self.columns + self.segments)


class _Band(NamedTuple):
    """Query blocks and sets of heads whose scratch is there at a time."""

    first: int
    end: int
    first_set: int
    sets: int
    stretches: list[_Stretch]

    @property
    def bytes(self) -> int:
        return self.sets * sum(one.bytes for one in self.stretches)

    def programs(self, span_log2: int) -> int:
        """Programs of the masses' kernel that take 2^span_log2 segments each."""
        return self.sets * sum(one.tiles * ceil_div(one.segments, 1 << span_log2) for one in self.stretches)

    def span_log2(self, places: int) -> int:
        """The longest span, so that its start weighs little, with enough programs for all places to end together."""
        spans = range(LARGEST_SPAN_LOG2, 0, -1)
        return next((log2 for log2 in spans if self.programs(log2) >= PROGRAMS_A_PLACE * places), 0)


def _bands(geometry: Geometry, rule: Rule, members: int, sets: int) -> Iterator[_Band]:
    """Cuts the probes' work so that scratch does not grow with the length.

    A band takes whole tiles of its last stretch where it can. Its sets are all, or where that is too much for one query
    block, as many as fit.
    """

    def bytes_of(first: int, end: int) -> int:
        return sum(one.bytes for one in _stretches(geometry, rule, members, first, end))

    rows = geometry.rows
    step = max(1, min(sets, SCRATCH_BYTES // bytes_of(rows - 1, rows)))
    limit = SCRATCH_BYTES // step
    first = 0
    while first < rows:
        end = rows
        if bytes_of(first, end) > limit:
            fitting = bisect.bisect_right(range(first + 1, rows), limit, key=functools.partial(bytes_of, first))
            end = first + max(1, fitting)
            *_, last = _stretches(geometry, rule, members, first, end)
            whole = end - (end - last.first) % max(1, TILE_ROWS // (members * last.probes))
            end = whole if whole > first else end
        stretches = list(_stretches(geometry, rule, members, first, end))
        for first_set in range(0, sets, step):
            yield _Band(first, end, first_set, min(step, sets - first_set), stretches)
        first = end


def _stretches(geometry: Geometry, rule: Rule, members: int, first: int, end: int) -> Iterator[_Stretch]:
    """The stretches of the query blocks from first to end.

    As two_sided.probes_of counts them, in closed form, because the host must not go through all blocks. probes._stretch
    does the same on the device.
    """
    keys, probes, b = FULL_SIGHT * rule.block_size, rule.probe_rows, rule.block_size
    while first < end:
        stop = end
        if probes > 1 and geometry.kv_len > keys:
            # the first query block whose last row stands behind those keys
            stop = min(end, max(keys - geometry.offset, 0) // b)
        if stop > first:
            tiles = ceil_div((stop - first) * members * probes, TILE_ROWS)
            columns = ceil_div(geometry.offset + min(stop * b, geometry.q_len), b)
            yield _Stretch(first, stop, probes, tiles, columns)
        first, keys, probes = max(first, stop), keys * SIGHT_STEP, max(probes // 2, 1)
