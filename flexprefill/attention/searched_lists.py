"""The blocks of a plain search, listed: a layout that was searched before takes the same launches again."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.call import Call
from flexprefill.attention.steps import split_of
from flexprefill.attention.tail import Split, in_one_row, words_in_parts
from flexprefill.blockmap.block_mask import ListedBlocks, offsets_at
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.index_lists import Listing, Lists, as_lists, new_lists
from flexprefill.runtime.listeners import is_recording
from flexprefill.runtime.replaying import LONG, replayed
from flexprefill.search.operator import find_words
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import MEANS_SCORER
from flexprefill.variant.variant import PLAIN


def lists_by_layout(call: Call, choice: BackendChoice) -> tuple[ListedBlocks, ...] | None:
    """What attend_listed takes for a call whose search is plain and not long. None for any other call.

    A long prompt keeps the device busy for longer than the host needs, and its memory is better taken step by step.

    Returns:
        The lists, and where the last rows are split, those of their parts.
    """
    query, key, config = call.query, call.key, call.config
    if call.layout is None or not _is_plain(call, choice):
        return None
    split = split_of(call, choice)
    rule = Rule.of(config, scale=call.scale, last_chunk=call.last_chunk)
    lists = replayed(("search and lists", call.layout, rule, split), partial(_search_and_list, rule, split), query, key)
    geometry = Geometry(query.shape[2], key.shape[2], config.block_size)
    whole = _listed(as_lists(lists[:4]), geometry, choice)
    if split is None:
        return (whole,)
    return whole, _listed(in_one_row(as_lists(lists[4:]), split), split.of_parts(geometry), choice)


def _listed(lists: Lists, geometry: Geometry, choice: BackendChoice) -> ListedBlocks:
    # FlashAttention-4 by itself knows where queries stand by the lengths
    needless = geometry.offset == 0 or choice.by_itself
    return ListedBlocks(lists, None if needless else offsets_at(lists[0], geometry.offset))


def _is_plain(call: Call, choice: BackendChoice) -> bool:
    """Whether nothing but the layout and the config decides what is launched, and nobody asks for the map itself."""
    config = call.config
    return (
        call.query.is_cuda
        and call.key.shape[2] < LONG
        and not (choice.dense or is_recording())
        and call.block_map is None
        and call.mask_mod is None
        and call.score_mod is None
        and call.variant is PLAIN
        and config.scorer == MEANS_SCORER
        and config.guard is None
        and not (config.mean_correction or isinstance(config.alpha, tuple))
    )


def _search_and_list(rule: Rule, split: Split | None, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    words = find_words(query, key, rule, "triton")
    geometry = Geometry(query.shape[2], key.shape[2], rule.block_size)
    if split is None:
        return new_lists(words, geometry, Listing())
    others, by_part = words_in_parts(words, geometry, split)
    return *new_lists(others, geometry, Listing()), *new_lists(by_part, split.of_rows(geometry), Listing())
