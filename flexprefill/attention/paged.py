"""prefill_attention over a PagedKV: in the pages where that is possible, else over gathered tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from flexprefill.attention.backends import MAX_ELEMENTS, BackendChoice, triton_options
from flexprefill.attention.call import Call
from flexprefill.attention.dense import DENSE_KERNELS, dense_attention
from flexprefill.attention.flex import LSE, FlexResult, FlexSettings, flex_over
from flexprefill.attention.not_finite import mark_rows_not_finite, may_not_be_finite
from flexprefill.attention.steps import attend_kept, choose, split_of
from flexprefill.attention.tail import attend_in_parts, lists_in_parts
from flexprefill.blockmap.block_mask import UNCUT, ListedBlocks, list_blocks
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap, all_blocks
from flexprefill.runtime.listeners import is_recording, note, note_attention
from flexprefill.search.blocks import refuse_with_pages, search_pages
from flexprefill.search.page_means import PageMeans
from flexprefill.variant.paged_kv import PagedKV

FLASH_GATHERS = "FlashAttention-4 takes keys in a row"


def choose_paged(call: Call, paged: PagedKV) -> BackendChoice:
    """The kernel for a call over pages, and whether they are gathered for it.

    Args:
        call: Its key and value are the pages' stand-ins.
        paged: The pages.

    Raises:
        ValueError: The call asks for what pages cannot give.
        UnsupportedError: As choose_backend.
    """
    arguments = {"variant": call.variant, "mask_mod": call.mask_mod, "score_mod": call.score_mod}
    refuse_with_pages(call.config, arguments, searched=call.block_map is None)
    choice = choose(call)
    if choice.name in DENSE_KERNELS:
        return replace(choice, gathers="dense attention takes keys in a row")
    against = paged.why_gathered(call.block_size) or _against_long_lists(call, paged)
    if against is not None:
        return replace(choice, gathers=against)
    return choice if choice.name == "cpp" else _choose_on_gpu(call, paged, choice)


def _choose_on_gpu(call: Call, paged: PagedKV, choice: BackendChoice) -> BackendChoice:
    """Whether Triton's kernel reads the pages, and with which options."""
    if choice.name == "flash":
        return replace(choice, gathers=FLASH_GATHERS)
    piece, pages = paged.piece(call.block_size), paged.in_a_row()
    if piece < call.block_size:
        # a tile of keys would be as small as a piece
        return replace(choice, gathers=f"kernels for a GPU read blocks whole, and a page has pieces of {piece} keys")
    if paged.reach >= MAX_ELEMENTS:
        return replace(choice, gathers=f"the pages span {paged.reach:,} elements, more than 32-bit offsets reach")
    assert pages is not None  # asked already
    options = triton_options(call._replace(key=pages[0], value=pages[1]).request())
    return replace(choice, kernel_options=options)


def _against_long_lists(call: Call, paged: PagedKV) -> str | None:
    """Why blocks of several pieces are not listed piece by piece; None if they can be."""
    piece = paged.piece(call.block_size)
    if piece == call.block_size:
        return None
    batch, heads, q_len, head_dim = call.query.shape
    _, kv_heads, kv_len, value_dim = call.value.shape
    listed = 8 * batch * heads * ceil_div(q_len, call.block_size) * ceil_div(kv_len, piece)  # two lists of int32
    copied = batch * kv_heads * kv_len * (head_dim + value_dim) * call.value.element_size()
    if listed <= copied:
        return None
    return (
        f"lists of pieces of {piece} keys would take {listed:,} bytes, and copies of the keys and values {copied:,}: "
        f"pages of {call.block_size} keys need no pieces"
    )


def attend_paged(
    call: Call, paged: PagedKV, choice: BackendChoice, means: PageMeans | None, buffers: ListBuffers | None
) -> FlexResult:
    """The output [B, Hq, S_q, Dv] and what return_aux asks for.

    Args:
        call: Checked; its key and value are the pages' stand-ins.
        paged: The pages.
        choice: `choose_paged`'s.
        means: Kept block means, or None.
        buffers: As in prefill_attention.
    """
    if means is not None and (choice.dense or call.block_map is not None):
        means.written(paged, call.query.shape[2])
    if choice.name in DENSE_KERNELS:
        key, value = paged.gather()
        return dense_attention(call.query, key, value, scale=call.scale, kernel=choice.name), AuxOutput()
    kept = _kept_blocks(call, paged, choice, means)
    recording = is_recording() and not choice.dense
    if choice.gathers is not None or recording:
        key, value = paged.gather()
        call = call._replace(key=key, value=value, layout=None)
    if recording:
        note_attention(call.attention, call.config if call.block_map is None else None)
        note(kept, kept)
    if choice.gathers is not None:
        return attend_kept(call, choice, kept, UNCUT, buffers)
    return _attend_in_place(call, paged, choice, kept, buffers)


def _kept_blocks(call: Call, paged: PagedKV, choice: BackendChoice, means: PageMeans | None) -> BlockMap:
    if choice.dense:
        return all_blocks(call.query, call.key, call.config.block_size)
    if call.block_map is not None:
        return call.block_map
    return search_pages(call.query, paged, call.config, call.scale, call.last_chunk, "auto", means)


def _attend_in_place(
    call: Call, paged: PagedKV, choice: BackendChoice, kept: BlockMap, buffers: ListBuffers | None
) -> FlexResult:
    pages = paged.in_a_row()
    assert pages is not None  # choose_paged asked
    places = paged.places(kept.block_size)
    asked = call.aux_request(dense=choice.dense)
    settings = FlexSettings(kept.block_size, call.scale, choice.kernel_options, asked, places.size)

    def attend(query: Tensor, listed: ListedBlocks, needs_lse: bool) -> FlexResult:
        return flex_over(query, *pages, listed, settings._replace(return_aux=LSE) if needs_lse else settings)

    if (split := split_of(call, choice)) is not None:
        in_parts = lists_in_parts(kept, split, buffers, places)
        return attend_in_parts(attend, call.query, kept.geometry, split, *in_parts)
    listed = list_blocks(kept.words, kept.geometry, UNCUT, buffers, places)
    output, aux = attend(call.query, listed, False)
    if choice.name == "cpp" and _may_not_be_finite(call, paged):
        mark_rows_not_finite(call._replace(key=paged.gather_keys()).attention, kept, output)
    return output, aux


def _may_not_be_finite(call: Call, paged: PagedKV) -> bool:
    """As may_not_be_finite, some pages at a time, so that no copy of all keys is made."""
    used = paged.block_table[:, : ceil_div(paged.kv_len, paged.page_size)].long()
    return any(may_not_be_finite(call.query, paged.pages_of_keys[page], call.scale) for page in used.unique().split(16))
