"""Launches the kernels of the two-sided search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from flexprefill.blockmap.bits import WORD_BITS
from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.runtime.devices import multiprocessors
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.search.kernels.farthest import farthest
from flexprefill.search.kernels.launch import SMALLEST_SCALE, hopper_copies
from flexprefill.search.kernels.outliers import outliers_kernel
from flexprefill.search.kernels.probes import probes_kernel
from flexprefill.search.rule import Rule
from flexprefill.search.two_sided import FULL_SIGHT, NEIGHBOURS, SIGHT_STEP
from flexprefill.variant.logits import LOG2_E

TILE_ROWS = 128  # probed rows of a tile
PROGRAMS = 2  # of the probes' kernel, a multiprocessor
PROBE_WARPS, PROBE_STAGES, OUTLIER_WARPS, OUTLIER_STAGES = 8, 2, 4, 2
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
        "GROUP": heads // key.shape[1], "qk_scale": rule.scale * LOG2_E, "sink_blocks": rule.sink_blocks,
        "window_blocks": rule.window_blocks, "last_full_blocks": rule.last_full_blocks, "D": query.shape[3],
    }  # fmt: skip
    if outliers is not None:
        _look_at(outliers, query, key, found, rule, shared)
        found = True
    if not rule.probe_rows:
        return words, None
    held = torch.empty(batch, heads, geometry.rows, dtype=torch.float32, device=query.device) if measured else None
    _probe(query, key, words, held, found, rule, shared)
    return words, held


def _look_at(outliers: Tensor, query: Tensor, key: Tensor, found: bool, rule: Rule, shared: dict[str, Any]) -> None:
    """Launches the outliers' kernel."""
    tiles = shared["rows"] * query.shape[0] * query.shape[1]
    log2_share = math.log2(rule.outlier_share)
    arguments = {"tiles": tiles, "log2_share": log2_share, "COUNT": outliers.shape[3], "FOUND": found, **shared}
    if hopper_takes_outliers(query, key, rule):
        from flexprefill.search.kernels import hopper_outliers  # imports triton's Gluon

        query_blocks, keys, vectors = hopper_outliers.describe(query, key, outliers)
        programs = min(tiles, hopper_outliers.programs(outliers) * multiprocessors(query.device))
        hopper_outliers.outliers_kernel[(programs,)](
            query=query_blocks, key=keys, outliers=vectors, num_warps=hopper_outliers.warps(outliers),
            maxnreg=hopper_outliers.REGISTERS, **arguments,
        )  # fmt: skip
        return
    outliers_kernel[(tiles,)](
        outliers_ptr=outliers, columns=outliers.shape[2], STAGES=OUTLIER_STAGES, num_warps=OUTLIER_WARPS,
        maxnreg=OUTLIER_REGISTERS if query.dtype != torch.float32 else None, **arguments,
        **_pointers("query", query), **_pointers("key", key), **_sizes(key, rule),
    )  # fmt: skip


def _probe(
    query: Tensor, key: Tensor, words: Tensor, held: Tensor | None, found: bool, rule: Rule, shared: dict[str, Any]
) -> None:
    """Launches the probes' kernel for each stretch of query blocks with as many probes. The long rows come first."""
    group = query.shape[1] // key.shape[1]
    far_count = max(rule.probe_rows // 2, 1)
    geometry = Geometry(query.shape[2], key.shape[2], rule.block_size)
    stretches = list(_stretches(geometry, rule.probe_rows))
    # a single probe is an even one
    with_far = max((end for _, end, probes in stretches if probes > 1), default=0)
    far = farthest(query, rule.block_size, far_count, first_blocks=with_far) if with_far else words
    members = min(triton.next_power_of_2(group), NEIGHBOURS)
    sets = query.shape[0] * key.shape[1] * ceil_div(group, members)
    on_hopper = hopper_takes_probes(query, key, rule)
    for first, end, probes in reversed(stretches):
        number = max(1, TILE_ROWS // (members * probes))
        tiles = sets * ceil_div(end - first, number)
        programs = min(tiles, PROGRAMS * multiprocessors(query.device))
        # a mass for each key block, and the sum, of each row
        stride = (words.shape[3] * WORD_BITS + 1) * members * number * probes
        with room_for("the search", 4 * programs * stride, query.device, IN_CHUNKS):
            scratch = torch.empty(programs, stride, dtype=torch.float32, device=query.device)
        arguments = {
            "far_ptr": far, "held_ptr": words if held is None else held, "scratch_ptr": scratch,
            "scratch_stride": stride, "first": first, "end": end, "tiles": tiles, "probe_share": rule.probe_share,
            "FAR": far_count, "MEMBERS": members, "NUMBER": number, "PROBES": probes, "FOUND": found,
            "HELD": held is not None, **_pointers("query", query), **shared,
        }  # fmt: skip
        if on_hopper:
            from flexprefill.search.kernels import hopper_probes  # imports triton's Gluon

            hopper_probes.probes_kernel[(programs,)](
                key=hopper_probes.describe_keys(key),
                num_warps=hopper_probes.WARPS,
                maxnreg=hopper_probes.REGISTERS,
                **arguments,
            )
        else:
            probes_kernel[(programs,)](
                STAGES=PROBE_STAGES, num_warps=PROBE_WARPS, **arguments, **_pointers("key", key), **_sizes(key, rule)
            )


def hopper_takes_outliers(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_outliers.outliers_kernel can do this search."""
    return hopper_copies(query) and hopper_copies(key) and rule.block_size == 128 and rule.scale >= SMALLEST_SCALE


def hopper_takes_probes(query: Tensor, key: Tensor, rule: Rule) -> bool:
    """Whether hopper_probes.probes_kernel can do this search."""
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


def _stretches(geometry: Geometry, probe_rows: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring query blocks with as many probes each: their first, one behind their last, and the number.

    As two_sided.probes_of counts them, in closed form, because the host must not go through all blocks.
    """
    first, reach, b = 0, FULL_SIGHT, geometry.block_size
    while first < geometry.rows:
        end = geometry.rows
        if probe_rows > 1 and geometry.kv_len > reach * b:
            # the first query block whose last row stands behind the first ``reach`` key blocks
            end = min(end, max(first, ceil_div(reach * b - geometry.offset + 1, b) - 1))
        if end > first:
            yield first, end, probe_rows
        first, reach, probe_rows = end, reach * SIGHT_STEP, max(probe_rows // 2, 1)
