"""prefill_attention's steps: choose a kernel, find the kept blocks, hide what masks hide, attend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from flexprefill.attention.backends import BackendChoice, Request, choose_backend, choose_dense, measured_dense_below
from flexprefill.attention.call import Call
from flexprefill.attention.flash import FlashMods, flash_over
from flexprefill.attention.flex import LSE, FlexResult, FlexSettings, flex_over, with_lse
from flexprefill.attention.log_sum_exp import flash_lse_factor
from flexprefill.attention.not_finite import mark_rows_not_finite
from flexprefill.attention.tail import TAIL_SPLIT_FROM, Split, attend_in_parts, lists_in_parts, parts_for
from flexprefill.blockmap.block_mask import Cut, ListedBlocks, cut_by, list_blocks, masks_of
from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap, all_blocks
from flexprefill.config import PrefillConfig
from flexprefill.errors import UnsupportedError
from flexprefill.runtime.compiling import pass_on_when_compiled
from flexprefill.runtime.listeners import is_recording
from flexprefill.runtime.operators import operator
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.blocks import search_checked
from flexprefill.search.key_means import KeyMeans
from flexprefill.variant.mods import hiding_masks
from flexprefill.variant.variant import AttentionVariant


def choose(call: Call) -> BackendChoice:
    """The kernel for a call, and whether it is dense."""
    request = call.request()
    sparse = _with_tail(call, request, choose_backend(call.backend, request))
    if call.block_map is not None:
        return sparse
    if call.query.shape[2] == 1 < call.key.shape[2] and call.last_chunk:
        reason = "a single query that ends the sequence is a step of decoding, which is dense and takes no search"
        if call.plain:
            return BackendChoice("dense-sdpa", reason, dense=True)
        return replace(sparse, reason=reason, dense=True, tail_parts=1)
    if not call.plain or is_recording():
        return sparse
    below = call.config.dense_below
    if below is None:
        below = measured_dense_below(request, sparse, call.config.two_sided)
    if call.key.shape[2] < below:
        return choose_dense(request, f"S_kv is below dense_below, which is {below} here")
    return sparse


def _with_tail(call: Call, request: Request, sparse: BackendChoice) -> BackendChoice:
    """The choice, with the last rows split where that is possible and pays."""
    rows = call.config.last_full_blocks if call.last_chunk else 0
    # a length that is a symbol cannot be compared here, and a mod may read a query's position
    if rows == 0 or request.device.type != "cuda" or request.compiling or request.mods or request.max_scores:
        return sparse
    if call.key.shape[2] < TAIL_SPLIT_FROM or call.query.shape[2] <= rows * request.block_size:
        return sparse
    batch, heads = call.query.shape[:2]
    parts = parts_for(batch * heads * rows, sparse.name, request.value_dim, request.device)
    most = ceil_div(call.key.shape[2], request.block_size) // (rows + 2)
    parts = max(1, min(parts, most))
    return replace(sparse, tail_parts=parts)


def kept_blocks(call: Call, choice: BackendChoice, means: KeyMeans | None) -> BlockMap:
    """The blocks to attend to: all, the caller's, or those of a search."""
    if choice.dense:
        return all_blocks(call.query, call.key, call.config.block_size)
    if call.block_map is not None:
        return call.block_map
    return search_checked(call.query, call.key, call.config, call.scale, call.last_chunk, "auto", means, call.variant)


def visible_blocks_of(call: Call, kept: BlockMap) -> tuple[BlockMap, Cut]:
    """The kept blocks that no mask empties, and what masks hide inside them."""
    hiding = hiding_masks(call.variant, kept.words, kept.geometry)
    words, cut = cut_by(kept.words, (*hiding, *masks_of(call.mask_mod, kept.words, kept.geometry)))
    return kept if words is kept.words else replace(kept, words=words), cut


def attend_kept(call: Call, choice: BackendChoice, kept: BlockMap, cut: Cut, buffers: ListBuffers | None) -> FlexResult:
    """Attention over the kept blocks, by FlexAttention or by FlashAttention-4 itself."""
    if (split := split_of(call, choice)) is not None:
        return attend_listed(call, choice, *lists_in_parts(kept, split, buffers))
    output, aux = attend_listed(call, choice, list_blocks(kept.words, kept.geometry, cut, buffers))
    if is_tracing() and not choice.dense:
        output, aux = sparse_by_any_compiler(call, kept, output, aux)
    if choice.name == "cpp":
        mark_rows_not_finite(call.attention, kept, output)
    return output, aux


def split_of(call: Call, choice: BackendChoice) -> Split | None:
    """How a call's last query blocks are split, if they are."""
    return Split(call.config.last_full_blocks, choice.tail_parts) if choice.tail_parts > 1 else None


def attend_listed(
    call: Call, choice: BackendChoice, listed: ListedBlocks, of_parts: ListedBlocks | None = None
) -> FlexResult:
    """Attention over listed blocks, and where the last rows are split, over those of their parts."""
    split = split_of(call, choice)
    if split is None or of_parts is None:
        return _attend(call, choice, listed)

    def attend(query: Tensor, listed: ListedBlocks, needs_lse: bool) -> FlexResult:
        if not needs_lse:
            return _attend(call, choice, listed)
        layout = None if call.layout is None else (call.layout, split)
        return _attend(call._replace(query=query, return_aux=LSE, layout=layout), choice, listed)

    geometry = Geometry(call.query.shape[2], call.key.shape[2], call.block_size)
    return attend_in_parts(attend, call.query, geometry, split, listed, of_parts)


def _attend(call: Call, choice: BackendChoice, listed: ListedBlocks) -> FlexResult:
    """Attention over the blocks of one list."""
    query, key, value, sequences = call.query, call.key, call.value, call.variant.sequences
    if sequences is not None:
        # a weight of zero times a value that is not finite is NaN
        value = value.masked_fill(sequences.padding[:, None, :, None], 0)
    asked = call.aux_request(dense=choice.dense)
    needs_lse = asked is not None and asked.lse
    if choice.by_itself:
        mods = FlashMods(call.variant.soft_cap, call.variant.sliding_window)
        return flash_over(query, key, value, listed, call.scale, mods, needs_lse, call.layout)
    settings = FlexSettings(call.block_size, call.scale, choice.kernel_options, asked)
    output, aux = flex_over(query, key, value, listed, settings, call.score_mods())
    if aux.lse is not None and choice.name == "flash":
        aux = with_lse(aux, aux.lse * flash_lse_factor(query.device))
    return output, aux


def sparse_by_any_compiler(call: Call, kept: BlockMap, output: Tensor, aux: AuxOutput) -> FlexResult:
    """FlexAttention's result inside a caller's graph, made sparse where the graph's compiler makes no kernel of it.

    Backends of torch.compile other than inductor run FlexAttention eagerly, which is dense. An exported program that
    runs as it is does so too. An operator stands behind FlexAttention: inductor compiles it to nothing, and wherever it
    runs it attends again, over the kept blocks.
    """
    pass_on_when_compiled("flexprefill::over_kept_blocks")
    own = call.mask_mod is not None or call.score_mod is not None or aux.max_scores is not None
    given = output, output.new_empty(0) if aux.lse is None else aux.lse
    words, size = kept.words, kept.block_size
    tensors = call.query, call.key, call.value
    output, sums = over_kept_blocks(*given, *tensors, words, size, call.scale, own, *call.variant.parts)
    return output, with_lse(aux, None if aux.lse is None else sums)


@operator("flexprefill::over_kept_blocks")
def over_kept_blocks(
    output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, words: Tensor, block_size: int,
    scale: float, own_mods: bool, starts: Tensor | None = None, ends: Tensor | None = None,
    sliding_window: int | None = None, soft_cap: float | None = None, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a map's blocks, and its log-sum-exps if ``lse`` holds any. Both have the shapes of those given."""
    if own_mods:
        raise UnsupportedError(
            "mask_mod, score_mod and max_scores need a graph that is compiled by inductor, torch.compile's default "
            "backend: any other runs FlexAttention eagerly, which ignores the block mask"
        )
    variant = AttentionVariant.of_parts((starts, ends, sliding_window, soft_cap, alibi_slopes))
    kept = BlockMap(words, query.shape[2], key.shape[2], block_size)
    asked = LSE if lse.numel() > 0 else None
    config = PrefillConfig(last_full_blocks=0)
    call = Call(query, key, value, config, variant, kept, None, None, scale, False, "auto", asked)
    output, aux = attend_kept(call, choose(call), *visible_blocks_of(call, kept), None)
    return output, lse.clone() if aux.lse is None else aux.lse


@torch.library.register_fake("flexprefill::over_kept_blocks")
def _(output, lse, *_):
    return torch.empty_like(output), torch.empty_like(lse)
