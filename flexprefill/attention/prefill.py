"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple, overload

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from flexprefill.attention.backends import BackendChoice, Request, choose_backend, choose_dense, measured_dense_below
from flexprefill.attention.call import Call, check_call, check_tensors
from flexprefill.attention.dense import DENSE_KERNELS, dense_attention
from flexprefill.attention.flex import FlexSettings, flex_over
from flexprefill.attention.log_sum_exp import flash_lse_factor, log_sum_exp_over
from flexprefill.attention.mean_correction import add_dropped_blocks
from flexprefill.attention.not_finite import mark_rows_not_finite
from flexprefill.attention.tail import TAIL_SPLIT_FROM, Split, flex_in_parts, parts_for
from flexprefill.blockmap.block_mask import Cut, cut_by, list_blocks, masks_of
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap, all_blocks, block_mask_under
from flexprefill.blockmap.masking import MaskMod
from flexprefill.config import PrefillConfig, check_config
from flexprefill.runtime.listeners import is_recording, note
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.blocks import search_blocks, search_checked
from flexprefill.search.key_means import KeyMeans, check_means
from flexprefill.variant.logits import add_sinks
from flexprefill.variant.mods import ScoreMod, hiding_masks
from flexprefill.variant.variant import PLAIN, AttentionVariant, check_variant

logger = logging.getLogger("flexprefill")


@overload
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = ...,
    *,
    variant: AttentionVariant | None = ...,
    block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ...,
    score_mod: ScoreMod | None = ...,
    scale: float | None = ...,
    last_chunk: bool = ...,
    backend: str = ...,
    return_aux: None = ...,
    means: KeyMeans | None = ...,
    buffers: ListBuffers | None = ...,
) -> Tensor: ...
@overload
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = ...,
    *,
    variant: AttentionVariant | None = ...,
    block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ...,
    score_mod: ScoreMod | None = ...,
    scale: float | None = ...,
    last_chunk: bool = ...,
    backend: str = ...,
    return_aux: AuxRequest,
    means: KeyMeans | None = ...,
    buffers: ListBuffers | None = ...,
) -> tuple[Tensor, AuxOutput]: ...
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    variant: AttentionVariant | None = None,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Causal attention of a prompt over the blocks that matter: exact softmax over the kept blocks alone.

    The compiled flex_attention is made once a process for each combination of device, dtype, heads, head
    dimensions, block size, scale, backend and mods, and kept; the first call of a kind therefore compiles for some
    seconds. It traces inside a caller's own ``torch.compile(fullgraph=True)``. :func:`explain_backend` says which
    kernel runs; so does each call in the log ``flexprefill`` at level DEBUG.

    Two kinds of call are dense instead:

    - fewer keys than ``config.dense_below``, for which a search does not pay. A ``block_map``, a mod, ``return_aux``,
      a named ``backend`` or masks being recorded ask for kept blocks, and get them at any length;
    - a single query after other tokens, a step of decoding: it attends to all keys, without a search, and no map is
      recorded. A ``block_map`` or ``last_chunk=False`` asks for kept blocks.

    Args:
        query: [B, Hq, S_q, D], the last S_q of the S_kv positions; float16, bfloat16 or float32.
        key: [B, Hkv, S_kv, D]; Hq a multiple of Hkv.
        value: [B, Hkv, S_kv, Dv]; D and Dv multiples of 8 from 16 to 256.
        config: the rule's settings, of which a given ``block_map`` leaves only ``mean_correction``: dropped blocks that
            are seen whole then answer with their mean key and value (docs/mean_correction.md). Not with mods or
            ``max_scores``.
        variant: what the attention is besides causal: sequences, a sliding window, a soft cap, ALiBi, sinks; see
            :class:`AttentionVariant`. Search and attention follow it.
        block_map: a map to use instead of a search, [B, Hq, M, N] of these lengths.
        mask_mod: a further mask_mod that hides elements inside the kept blocks, any of which is then partial; or a
            BlockMask that is made once for all layers (:meth:`BlockMap.with_mask`, create_block_mask), which says of
            each block whether it is hidden, cut or left whole.
        score_mod: FlexAttention's score_mod; the search does not know of it. It follows the soft cap and ALiBi.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        last_chunk: whether these queries end the prompt, as in :func:`search_blocks`.
        backend: "triton" (CUDA), "flash" (a Hopper GPU with the package flash-attn-4), or "auto": on CUDA flash where
            it can do the request and there are no mods, else triton; FlexAttention's own C++ kernel on the CPU.
        return_aux: as in flex_attention; not on the CPU. FlashAttention-4's log-sum-exp is checked on the device at
            the first use, which waits for it, and corrected where torch scales it wrongly.
        means: block means kept from chunk to chunk, as in :func:`search_blocks`; not used by a call without a search.
        buffers: memory for the index lists, shared by calls that follow each other on one stream; not inside
            torch.compile.

    Returns:
        [B, Hq, S_q, Dv], and with ``return_aux`` a pair of it and flex_attention's AuxOutput.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: the backend cannot run here; no C++ compiler is found, which the CPU needs; or
            torch.compile would not run (its recompile limit is hit, or it is switched off), and FlexAttention
            would then ignore the mask and be dense; or FlashAttention-4 gives a wrong log-sum-exp.
        NotEnoughMemoryError: the search or its index lists do not fit into the device's memory.
    """
    scale = check_tensors(query, key, value, scale)
    asked = block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
    call = check_call(Call(query, key, value, config, PLAIN if variant is None else variant, *asked))
    check_means(means)
    choice = choose(call)
    if not is_tracing() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("prefill_attention of %s over %s: %s", list(query.shape), list(key.shape), choice)
    if choice.name in DENSE_KERNELS:
        return dense_attention(query, key, value, scale=scale, kernel=choice.name)
    kept, cut = _visible(call, _kept(call, choice, means))
    if not choice.dense:
        note(kept)
    attended = _attend(call, choice, kept, cut, buffers)
    if config.mean_correction and not choice.dense:
        attended = _corrected(call, kept, attended)
    if call.variant.sinks is not None:
        attended = _with_sinks(call, kept, attended)
    if return_aux is None:
        return attended.output
    lse = attended.lse if return_aux.lse else None
    return attended.output, AuxOutput(lse=lse, max_scores=attended.max_scores)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    variant: AttentionVariant | None = None,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
) -> BackendChoice:
    """What would compute :func:`prefill_attention` of the same arguments, with which options, and why not by others.

    Nothing is searched or attended.

    Args: as in :func:`prefill_attention`.

    Raises:
        TypeError, ValueError, FlexPrefillError: as :func:`prefill_attention`, where it would not run.
    """
    scale = check_tensors(query, key, value, scale)
    asked = block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
    return choose(check_call(Call(query, key, value, config, PLAIN if variant is None else variant, *asked)))


def create_prefill_block_mask(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    variant: AttentionVariant | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
) -> BlockMask:
    """The BlockMask of the blocks that :func:`search_blocks` finds, for a compiled flex_attention.

    Args:
        query, key, config, scale, last_chunk, means: as in :func:`search_blocks`.
        variant: as in :func:`search_blocks`. Sequences and sliding window are part of the mask; for flex_attention
            itself soft cap and ALiBi are a score_mod, which is the caller's.
        mask_mod: a further mask_mod that hides elements, or a BlockMask; it is applied inside the kept blocks, and the
            search does not know of it.
        buffers: memory for the index lists, as in :meth:`BlockMap.to_block_mask`.

    Returns:
        A BlockMask for [B, Hq, S_q, S_kv], causal per element. Call flex_attention under torch.compile with
        it: outside, FlexAttention ignores the block lists and is dense.

    Raises:
        TypeError, ValueError: as :func:`search_blocks`, or ``config.mean_correction`` is set.
    """
    check_config(config)
    if config.mean_correction:
        raise ValueError(
            "config.mean_correction is more than a BlockMask can say: call prefill_attention, or pass a config with "
            "mean_correction=False"
        )
    kept = search_blocks(query, key, config, variant=variant, scale=scale, last_chunk=last_chunk, means=means)
    hiding = hiding_masks(check_variant(variant, query, key), kept.words, kept.geometry)
    return block_mask_under(kept, (*hiding, *masks_of(mask_mod, kept.words, kept.geometry)), buffers)


def choose(call: Call) -> BackendChoice:
    """The kernel for a call, and whether it is dense."""
    request = call.request()
    sparse = _with_tail(call, request, choose_backend(call.backend, request))
    if call.block_map is not None:
        return sparse
    if call.decodes:
        reason = "a single query that ends the sequence is a step of decoding, which is dense and takes no search"
        if call.plain:
            return BackendChoice("dense-sdpa", reason, dense=True)
        return BackendChoice(sparse.name, reason, True, sparse.kernel_options, sparse.passed_over)
    if not call.plain or is_recording():
        return sparse
    below = call.config.dense_below
    if below is None:
        below = measured_dense_below(request, sparse)
    if call.key.shape[2] < below:
        return choose_dense(request, f"S_kv is below dense_below, which is {below} here")
    return sparse


def _with_tail(call: Call, request: Request, sparse: BackendChoice) -> BackendChoice:
    """The choice, its last rows split where that pays and is possible."""
    rows = call.config.last_full_blocks if call.last_chunk else 0
    # lengths are symbols while compiling, and a mod may read the position of a query
    if rows == 0 or request.device.type != "cuda" or request.compiling or request.mods or request.max_scores:
        return sparse
    if call.key.shape[2] < TAIL_SPLIT_FROM or call.query.shape[2] <= rows * request.block_size:
        return sparse
    batch, heads = call.query.shape[:2]
    parts = parts_for(batch * heads * rows, sparse.name, request.value_dim, request.device)
    most = -(-call.key.shape[2] // request.block_size) // (rows + 2)
    return replace(sparse, tail_parts=max(1, min(parts, most)))


def _kept(call: Call, choice: BackendChoice, means: KeyMeans | None) -> BlockMap:
    """The blocks to attend to: all, the caller's, or those that a search finds."""
    if choice.dense:
        return all_blocks(call.query, call.key, call.config.block_size)
    if call.block_map is not None:
        return call.block_map
    return search_checked(call.query, call.key, call.config, call.scale, call.last_chunk, "auto", means, call.variant)


def _visible(call: Call, kept: BlockMap) -> tuple[BlockMap, Cut]:
    """The kept blocks that masks do not empty, and what they hide inside them."""
    hiding = hiding_masks(call.variant, kept.words, kept.geometry)
    words, cut = cut_by(kept.words, (*hiding, *masks_of(call.mask_mod, kept.words, kept.geometry)))
    return replace(kept, words=words), cut


class Attended(NamedTuple):
    """What attention over blocks gave."""

    output: Tensor
    lse: Tensor | None
    max_scores: Tensor | None


def _attend(call: Call, choice: BackendChoice, kept: BlockMap, cut: Cut, buffers: ListBuffers | None) -> Attended:
    """FlexAttention over the kept blocks."""
    query, key, value, sequences = call.query, call.key, call.value, call.variant.sequences
    if sequences is not None:
        # a weight of zero times what is not finite would be NaN
        value = value.masked_fill(sequences.padding[:, None, :, None], 0)
    asked = call.aux_request(correct=call.config.mean_correction and not choice.dense)
    settings = FlexSettings(kept.block_size, call.scale, choice.kernel_options, asked)
    split = choice.tail_parts > 1
    needs_lse = split or (asked is not None and asked.lse)
    factor = flash_lse_factor(query.device) if choice.name == "flash" and needs_lse else 1.0
    if split:
        tail = Split(call.config.last_full_blocks, choice.tail_parts, factor)
        output, aux = flex_in_parts(query, key, value, kept, tail, settings, buffers)
    else:
        listed = list_blocks(kept.words, kept.geometry, cut, buffers)
        output, aux = flex_over(query, key, value, listed, settings, call.score_mods())
        if choice.name == "cpp":
            mark_rows_not_finite(call.attention, kept, output)
    if aux is None:
        return Attended(output, None, None)
    lse = aux.lse if aux.lse is None or factor == 1 else aux.lse * factor
    return Attended(output, lse, aux.max_scores)


def _corrected(call: Call, kept: BlockMap, attended: Attended) -> Attended:
    """With the means of the dropped blocks."""
    tensors = call.query, call.key, call.value
    output, lse = add_dropped_blocks(*tensors, kept, attended.output, attended.lse, scale=call.scale)
    return attended._replace(output=output, lse=lse)


def _with_sinks(call: Call, kept: BlockMap, attended: Attended) -> Attended:
    """With the variant's sinks in the softmax; the log-sum-exp stays without them."""
    lse = log_sum_exp_over(call.attention, kept) if attended.lse is None else attended.lse
    assert call.variant.sinks is not None
    return attended._replace(output=add_sinks(attended.output, lse, call.variant.sinks), lse=lse)
