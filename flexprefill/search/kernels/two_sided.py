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
from flexprefill.runtime.state import remembered
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
    means_found = words is not None
    by_hopper = hopper_takes_outliers(query, key, rule), hopper_takes_probes(query, key, rule)
    sizes = tuple(query.shape), key.shape[1], key.shape[2]
    plan = _plan_two_sided(sizes, query.dtype, query.device, rule, by_hopper, means_found, measured, SCRATCH_BYTES)
    if words is None:
        with room_for("the search", 4 * math.prod(plan.words), query.device, IN_CHUNKS):
            words = torch.empty(plan.words, dtype=torch.int32, device=query.device)
    far = None
    if outliers is not None:
        far = _look_at(outliers, query, key, words, plan, by_hopper[0])
    if not rule.probe_rows:
        return words, None
    held = torch.empty(plan.words[:3], dtype=torch.float32, device=query.device) if measured else None
    _probe(query, key, far, words, held, plan, by_hopper[1])
    return words, held


def _look_at(
    outliers: Tensor, query: Tensor, key: Tensor, words: Tensor, plan: _Plan, by_hopper: bool
) -> Tensor | None:
    """Launches the outliers' kernel. Where that picks the farthest rows of query blocks too, it returns them."""
    if by_hopper:
        from flexprefill.search.kernels import hopper_outliers  # imports triton's Gluon

        query_blocks, keys, vectors = hopper_outliers.describe(query, key, outliers)
        far = torch.empty(plan.far, dtype=torch.int32, device=query.device) if plan.far_blocks else None
        launch(
            hopper_outliers.outliers_kernel, plan.outliers_grid, query=query_blocks, key=keys, outliers=vectors,
            words_ptr=words, far_ptr=words if far is None else far, **plan.outliers,
        )  # fmt: skip
        return far
    launch(
        outliers_kernel, plan.outliers_grid, outliers_ptr=outliers, words_ptr=words, **_pointers("query", query),
        **_pointers("key", key), **plan.outliers,
    )  # fmt: skip
    return None


def _probe(
    query: Tensor, key: Tensor, far: Tensor | None, words: Tensor, held: Tensor | None, plan: _Plan, by_hopper: bool
) -> None:
    """Launches the probes' kernels, the one that weighs and the one that decides, for each band of the work."""
    if far is None:
        far = words  # not read, unless rows are picked
        if plan.far_blocks:
            far = farthest(query, plan.block_size, plan.far[3], first_blocks=plan.far_blocks)
    with room_for("the search", 4 * plan.scratch, query.device, IN_CHUNKS):
        scratch = torch.empty(plan.scratch, dtype=torch.float32, device=query.device)
    if by_hopper:
        from flexprefill.search.kernels import hopper_probes  # imports triton's Gluon

        kernel, of_keys = hopper_probes.masses_kernel, {"key": hopper_probes.describe_keys(key)}
    else:
        kernel, of_keys = masses_kernel, _pointers("key", key)
    of_queries = _pointers("query", query)
    for band in plan.bands:
        launch(kernel, band.masses_grid, scratch_ptr=scratch, far_ptr=far, **of_queries, **of_keys, **band.masses)
        launch(
            decide_kernel, band.decide_grid, scratch_ptr=scratch, words_ptr=words,
            held_ptr=words if held is None else held, **band.decide,
        )  # fmt: skip


class _BandLaunches(NamedTuple):
    """What the launches for a band need besides tensors."""

    masses_grid: tuple[int]
    masses: dict[str, Any]
    decide_grid: tuple[int]
    decide: dict[str, Any]


class _Plan(NamedTuple):
    """What the launches of a two-sided search need besides tensors."""

    words: tuple[int, ...]  # a shape
    block_size: int
    far: tuple[int, ...]  # a shape, of the query blocks' farthest rows
    far_blocks: int  # how many of them are picked
    scratch: int  # numbers
    outliers_grid: tuple[int]
    outliers: dict[str, Any]
    bands: tuple[_BandLaunches, ...]


@remembered("launches of the two-sided search", most=1024)
def _plan_two_sided(
    sizes: tuple[tuple[int, ...], int, int], dtype: torch.dtype, device: torch.device, rule: Rule,
    by_hopper: tuple[bool, bool], means_found: bool, measured: bool, scratch_bytes: int,
) -> _Plan:  # fmt: skip
    """The launches for queries of a shape, so many key heads, and so many keys."""
    (batch, heads, q_len, head_dim), kv_heads, kv_len = sizes
    geometry, group = Geometry(q_len, kv_len, rule.block_size), heads // kv_heads
    rows, width = geometry.rows, ceil_div(geometry.columns, WORD_BITS)
    members = min(triton.next_power_of_2(group), NEIGHBOURS)
    far_count = max(rule.probe_rows // 2, 1)
    far_blocks = _far_blocks(geometry, rule)
    # not 0: times a hidden product's -inf it would be NaN
    of_keys = {"qk_scale": max(rule.scale * LOG2_E, SMALLEST_SCALE), "D": head_dim, "HEADS": heads, "GROUP": group}
    lengths = {"q_len": q_len, "kv_len": kv_len}
    kept_anyway = {
        "rows": rows, "width": width, "sink_blocks": rule.sink_blocks, "window_blocks": rule.window_blocks,
        "last_full_blocks": rule.last_full_blocks,
    }  # fmt: skip

    tiles = batch * heads * rows
    outliers: dict[str, Any] = {"tiles": tiles, "log2_share": math.log2(rule.outlier_share), "COUNT": rule.outlier_keys}
    outliers |= {"FOUND": means_found, **of_keys, **lengths, **kept_anyway}
    programs = tiles
    if by_hopper[0] and rule.outlier_keys:
        from flexprefill.search.kernels import hopper_outliers  # imports triton's Gluon

        count = rule.outlier_keys
        programs = min(tiles, hopper_outliers.programs(count) * multiprocessors(device))
        outliers |= {"far_blocks": far_blocks, "FAR": far_count if far_blocks else 0}
        outliers |= {"num_warps": hopper_outliers.warps(count), "maxnreg": hopper_outliers.REGISTERS}
    else:
        registers = OUTLIER_REGISTERS if dtype != torch.float32 else None
        outliers |= {"columns": geometry.columns, "STAGES": OUTLIER_STAGES, "maxnreg": registers}
        outliers |= {"num_warps": OUTLIER_WARPS, **_tiling(head_dim, dtype, rule)}

    of_probes: dict[str, Any] = {"STAGES": PROBE_STAGES, "num_warps": PROBE_WARPS, **_tiling(head_dim, dtype, rule)}
    if by_hopper[1]:
        from flexprefill.search.kernels import hopper_probes  # imports triton's Gluon

        of_probes = {"num_warps": hopper_probes.WARPS, "maxnreg": hopper_probes.REGISTERS}
    deciding = {
        **kept_anyway, "probe_share": rule.probe_share, "BLOCK": rule.block_size,
        "FOUND": means_found or rule.outlier_keys > 0, "HELD": measured, "num_warps": DECIDE_WARPS,
    }  # fmt: skip
    places = PROGRAMS * multiprocessors(device)
    found = []
    bands: list[_Band] = []
    if rule.probe_rows:
        bands = list(_bands(geometry, rule, members, batch * kv_heads * ceil_div(group, members), scratch_bytes))
    for band in bands:
        span_log2 = band.span_log2(places)
        of_band = {
            **lengths, "GROUP": group, "MEMBERS": members, "PROBES_LOG2": rule.probe_rows.bit_length() - 1,
            "first": band.first, "end": band.end, "first_set": band.first_set, "sets": band.sets,
        }  # fmt: skip
        weighing = {**of_keys, "span_log2": span_log2, "FAR": far_count, **of_probes, **of_band}
        grids = (band.programs(span_log2),), ((band.end - band.first) * band.sets,)
        found.append(_BandLaunches(grids[0], weighing, grids[1], {**deciding, **of_band}))
    return _Plan(
        (batch, heads, rows, width),
        rule.block_size,
        (batch, heads, rows, far_count),
        far_blocks,
        max((band.bytes for band in bands), default=0) // 4,
        (programs,),
        outliers,
        tuple(found),
    )


def _far_blocks(geometry: Geometry, rule: Rule) -> int:
    """Of how many query blocks the farthest rows are probed, the first ones. A single probe is an even one."""
    stretches = _stretches(geometry, rule, 1, 0, geometry.rows) if rule.probe_rows > 1 else ()
    return max((one.end for one in stretches if one.probes > 1), default=0)


def hopper_takes_outliers(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_outliers.outliers_kernel can do this search."""
    return hopper_copies(query) and hopper_copies(key) and rule.block_size == 128 and rule.scale >= SMALLEST_SCALE


def hopper_takes_probes(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_probes.masses_kernel can do this search."""
    members = min(triton.next_power_of_2(query.shape[1] // key.shape[1]), NEIGHBOURS)
    return hopper_copies(key) and rule.block_size == 128 and members * rule.probe_rows <= TILE_ROWS


def _tiling(head_dim: int, dtype: torch.dtype, rule: Rule) -> dict[str, int]:
    """What the kernels that run anywhere are told besides."""
    head_pad = triton.next_power_of_2(head_dim)
    whole = dtype != torch.float32 and head_pad <= 128
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


def _bands(geometry: Geometry, rule: Rule, members: int, sets: int, scratch_bytes: int) -> Iterator[_Band]:
    """Cuts the probes' work so that scratch does not grow with the length.

    A band takes whole tiles of its last stretch where it can. Its sets are all, or where that is too much for one query
    block, as many as fit.
    """

    def bytes_of(first: int, end: int) -> int:
        return sum(one.bytes for one in _stretches(geometry, rule, members, first, end))

    rows = geometry.rows
    step = max(1, min(sets, scratch_bytes // bytes_of(rows - 1, rows)))
    limit = scratch_bytes // step
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
