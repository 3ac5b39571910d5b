"""The checked call, and the kernel that computes it. Calls that are alike are checked, and get a kernel, once."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import NamedTuple, cast

from torch import Tensor

from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.call import Asked, Call, checked
from flexprefill.attention.paged import choose_paged
from flexprefill.attention.steps import choose
from flexprefill.blockmap.map import BlockMap, check_block_map
from flexprefill.config import PrefillConfig
from flexprefill.runtime.layout import has_unlikely_heads
from flexprefill.runtime.listeners import is_recording
from flexprefill.runtime.state import Remembered
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.inputs import facts_of
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.variant import PLAIN, AttentionVariant

NO = type(None)
# of config, block_map, scale, last_chunk and backend in a call that has a kind
TYPES = (NO, PrefillConfig), (NO, BlockMap), (NO, float), (bool,), (str,)


class Decided(NamedTuple):
    """What is the same for calls that are alike."""

    config: PrefillConfig
    scale: float
    layout: Hashable | None
    choice: BackendChoice


_decided: Remembered[Decided] = Remembered("what was decided of calls", most=1024)


def decide(asked: Asked) -> tuple[Call, BackendChoice]:
    """The checked call and its kernel.

    Raises:
        TypeError, ValueError, UnsupportedError: As prefill_attention.
    """
    kind = _kind_of(asked)
    known = None if kind is None else _decided.find(kind)
    if known is None:
        return _decide_anew(asked, kind)
    query, key, value = cast("tuple[Tensor, Tensor, Tensor]", asked[:3])  # a PagedKV has no kind
    block_map, last_chunk, backend = asked.block_map, asked.last_chunk, asked.backend
    if block_map is not None:
        check_block_map(block_map, query, key)
    config, scale, layout, choice = known
    # the call's own where there are any: equal ones may be written in another way, such as 1 and 1.0
    config, scale = asked.config or config, scale if asked.scale is None else asked.scale
    return Call(
        query, key, value, config, PLAIN, block_map, None, None, scale, last_chunk, backend, None, layout
    ), choice


def _decide_anew(asked: Asked, kind: Hashable | None) -> tuple[Call, BackendChoice]:
    call = checked(asked)
    choice = choose_paged(call, asked.key) if isinstance(asked.key, PagedKV) else choose(call)
    was_cast = any(ours is not theirs for ours, theirs in zip(call[:3], asked[:3], strict=True))
    # each call with unlikely heads is warned of
    if not (kind is None or was_cast or has_unlikely_heads(call.query)):
        _decided.keep(kind, Decided(call.config, call.scale, call.layout, choice))
    return call, choice


def _kind_of(asked: Asked) -> Hashable | None:
    """All that the checks and the choice look at. None where they may look at more."""
    query, key, value, config, variant, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux = asked
    if is_tracing() or not (mask_mod is score_mod is return_aux is None):
        return None
    if not (variant is None or variant is PLAIN or (type(variant) is AttentionVariant and variant == PLAIN)):
        return None
    # equal things of other types may not be taken, such as 1 for True
    given = config, block_map, scale, last_chunk, backend
    if not all(map(operator.contains, TYPES, map(type, given))):
        return None
    facts = facts_of(query, key, value)
    if facts is None:
        return None
    size = None if block_map is None else block_map.block_size
    return facts, config, scale, last_chunk, backend, size, is_recording()
