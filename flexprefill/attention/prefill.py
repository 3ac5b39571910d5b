"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import logging
from typing import overload

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.call import Asked, plain_mods
from flexprefill.attention.decide import decide
from flexprefill.attention.dense import DENSE_KERNELS, dense_attention
from flexprefill.attention.flex import with_lse
from flexprefill.attention.log_sum_exp import log_sum_exp_over
from flexprefill.attention.mean_correction import add_dropped_blocks
from flexprefill.attention.paged import attend_paged
from flexprefill.attention.searched_lists import lists_by_layout
from flexprefill.attention.steps import (
    attend_kept,
    attend_listed,
    kept_blocks,
    visible_blocks_of,
)
from flexprefill.blockmap.block_mask import masks_of
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap, block_mask_under
from flexprefill.blockmap.masking import MaskMod
from flexprefill.config import PrefillConfig
from flexprefill.runtime.listeners import is_recording, note, note_attention
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.blocks import search_blocks
from flexprefill.search.defaults import resolve_config
from flexprefill.search.key_means import KeyMeans, check_means
from flexprefill.search.page_means import PageMeans
from flexprefill.search.scorers import MEANS_SCORER
from flexprefill.variant.inputs import resolve_scale
from flexprefill.variant.logits import PlainAttention, add_sinks
from flexprefill.variant.mods import ScoreMod, hiding_masks
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.variant import AttentionVariant, check_variant

logger = logging.getLogger("flexprefill")


@overload
def prefill_attention(
    query: Tensor, key: Tensor | PagedKV, value: Tensor | None = ..., config: PrefillConfig | None = ..., *,
    variant: AttentionVariant | None = ..., block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ..., score_mod: ScoreMod | None = ...,
    scale: float | None = ..., last_chunk: bool = ..., backend: str = ...,
    return_aux: None = ..., means: KeyMeans | PageMeans | None = ..., buffers: ListBuffers | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def prefill_attention(
    query: Tensor, key: Tensor | PagedKV, value: Tensor | None = ..., config: PrefillConfig | None = ..., *,
    variant: AttentionVariant | None = ..., block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ..., score_mod: ScoreMod | None = ...,
    scale: float | None = ..., last_chunk: bool = ..., backend: str = ...,
    return_aux: AuxRequest, means: KeyMeans | PageMeans | None = ..., buffers: ListBuffers | None = ...,
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip
def prefill_attention(
    query: Tensor,
    key: Tensor | PagedKV,
    value: Tensor | None = None,
    config: PrefillConfig | None = None,
    *,
    variant: AttentionVariant | None = None,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
    means: KeyMeans | PageMeans | None = None,
    buffers: ListBuffers | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Causal attention of a prompt over the blocks that matter. The softmax over the kept blocks is exact.

    The first call of a kind compiles flex_attention, which takes some seconds. A kind is a combination of device,
    dtype, heads, head dimensions, block size, scale, backend and mods. The compiled function is kept for the process.
    The call can be traced inside a caller's own ``torch.compile(fullgraph=True)``. ``explain_backend`` names the kernel
    that runs. The log ``flexprefill`` does so for each call at level DEBUG.

    Two kinds of call are dense:

    - Fewer keys than ``config.dense_below``: a search does not pay. A ``block_map``, a mod, ``return_aux``, a named
      ``backend`` or masks being recorded ask for kept blocks, and get them at any length.
    - A single query after other tokens (a step of decoding): it attends to all keys without a search, and no map is
      recorded. A ``block_map`` or ``last_chunk=False`` asks for kept blocks.

    Args:
        query: [B, Hq, S_q, D], float16, bfloat16 or float32. The queries are the last S_q of the S_kv positions.
        key: [B, Hkv, S_kv, D]. Hq is a multiple of Hkv. Autocast casts tensors of several dtypes to its own. Or a
            `PagedKV` of keys and values, with query's dtype. It takes no variant, mod or mean correction.
        value: [B, Hkv, S_kv, Dv]. D and Dv are multiples of 8 from 16 to 256. None with a `PagedKV`.
        config: The settings of the search. None is the default of ``search_blocks``: the two-sided search where it can
            look. With a ``block_map`` only ``mean_correction`` is used: dropped blocks that are seen whole then answer
            with their mean key and value (docs/explanations/mean_correction.md). It cannot be combined with mods or
            ``max_scores``.
        variant: What the attention is besides causal: sequences, a sliding window, a soft cap, ALiBi, sinks; see
            ``AttentionVariant``. Search and attention follow it.
        block_map: A map to use instead of a search, [B, Hq, M, N] of these lengths.
        mask_mod: Hides elements inside the kept blocks. Either a mask_mod, with which any kept block is partial, or a
            BlockMask made once for all layers (``BlockMap.with_mask``, create_block_mask). A BlockMask says of each
            block whether it is hidden, cut or left whole.
        score_mod: FlexAttention's score_mod. It applies after the soft cap and ALiBi. The search does not know of it.
        scale: Factor on the dot products. Default: 1 / sqrt(D).
        last_chunk: Whether these queries end the prompt, as in ``search_blocks``.
        backend: "triton" (CUDA), "flash" (a Hopper GPU with the package flash-attn-4) or "auto". On CUDA, "auto" is
            flash where flash can do the request and is faster: without mods, and with a variant's sequences, window, or
            soft cap without sequences. Elsewhere it is triton. On the CPU it is FlexAttention's own C++ kernel.
        return_aux: As in flex_attention. Not supported on the CPU. FlashAttention-4's log-sum-exp is checked at its
            first use, which waits for the device, and corrected where torch scales it wrongly.
        means: Block means kept from chunk to chunk, as in ``search_blocks``. A call without a search does not use them.
            For a `PagedKV` it is a `PageMeans`.
        buffers: Memory for the index lists, shared by calls that follow each other on one stream. Not inside
            torch.compile.

    Returns:
        The output, [B, Hq, S_q, Dv]. With ``return_aux`` a pair of the output and flex_attention's AuxOutput.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
        FlexPrefillError: The backend cannot run here. Or the CPU's kernel finds no C++ compiler. Or torch.compile would
            not run because it is switched off or its recompile limit is hit: FlexAttention would then ignore the mask
            and be dense. Or FlashAttention-4 gives a wrong log-sum-exp.
        NotEnoughMemoryError: The search or its index lists do not fit into the device's memory.
    """
    call, choice = decide(
        Asked(
            query, key, value, config, variant, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
        )
    )
    check_means(means, key)
    if not is_tracing() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("prefill_attention of %s over %s: %s", list(call.query.shape), list(call.key.shape), choice)
    if isinstance(key, PagedKV):
        assert not isinstance(means, KeyMeans)  # checked
        output, aux = attend_paged(call, key, choice, means, buffers)
        return output if return_aux is None else (output, aux)
    query, key, value, config, variant, scale = call.query, call.key, call.value, call.config, call.variant, call.scale
    if choice.name in DENSE_KERNELS:
        return dense_attention(query, key, value, scale=scale, kernel=choice.name, layout=call.layout)
    assert not isinstance(means, PageMeans)  # checked
    listed = lists_by_layout(call, choice) if means is None and buffers is None else None
    if listed is not None:
        output, aux = attend_listed(call, choice, *listed)
        return output if return_aux is None else (output, aux)
    correct = config.mean_correction and not choice.dense
    if correct and means is None and config.scorer == MEANS_SCORER and call.layout is not None:
        means = KeyMeans()  # the search and the correction share them
    searched = kept_blocks(call, choice, means)
    kept, cut = visible_blocks_of(call, searched)
    if not choice.dense and is_recording():
        note_attention(call.attention, config if block_map is None else None)
        note(kept, searched)
    output, aux = attend_kept(call, choice, kept, cut, buffers)
    if correct or variant.sinks is not None:
        lse = log_sum_exp_over(call.attention, kept) if aux.lse is None else aux.lse
        if correct:
            # without a search, means may be of other keys
            key_means = None if means is None or block_map is not None else means.of_all(key.shape[2])
            output, lse = add_dropped_blocks(call, kept, output, lse, key_means)
        if variant.sinks is not None:
            output = add_sinks(output, lse, variant.sinks)  # the log-sum-exp stays without them
        aux = with_lse(aux, lse)
    if return_aux is None:
        return output
    return output, aux if return_aux.lse else with_lse(aux, None)


def explain_backend(
    query: Tensor,
    key: Tensor | PagedKV,
    value: Tensor | None = None,
    config: PrefillConfig | None = None,
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
    """Which kernel ``prefill_attention`` takes for the same arguments, with which options, and why not others.

    Nothing is searched or attended. The arguments are those of ``prefill_attention``.

    Returns:
        The choice with its reasons.

    Raises:
        TypeError, ValueError, FlexPrefillError: As ``prefill_attention``, where that would not run.
    """
    return decide(
        Asked(
            query, key, value, config, variant, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
        )
    )[1]


def create_prefill_block_mask(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig | None = None,
    *,
    variant: AttentionVariant | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
) -> BlockMask:
    """The BlockMask of the blocks that ``search_blocks`` finds, for a compiled flex_attention.

    Call flex_attention under torch.compile with it. Outside of torch.compile, FlexAttention ignores the block lists and
    is dense.

    Args:
        query: As in ``search_blocks``.
        key: As in ``search_blocks``.
        config: As in ``search_blocks``.
        variant: As in ``search_blocks``. Sequences and sliding window are part of the mask. Soft cap and ALiBi are not:
            give flex_attention a score_mod for them.
        mask_mod: Hides elements inside the kept blocks: a mask_mod or a BlockMask. The search does not know of it.
        scale: As in ``search_blocks``.
        last_chunk: As in ``search_blocks``.
        means: As in ``search_blocks``.
        buffers: Memory for the index lists, as in ``BlockMap.to_block_mask``.

    Returns:
        A BlockMask for [B, Hq, S_q, S_kv], causal per element.

    Raises:
        TypeError, ValueError: As ``search_blocks``, or ``config.mean_correction`` is set.
    """
    if isinstance(key, PagedKV):
        raise TypeError(
            "key must be a tensor [B, H, S, D], got a PagedKV: a BlockMask names key blocks in a row, so pass the keys "
            "of PagedKV.gather(), or call prefill_attention, which reads pages"
        )
    if isinstance(config, PrefillConfig) and config.mean_correction:
        raise ValueError(
            "config.mean_correction is more than a BlockMask can say: call prefill_attention, or pass a config with "
            "mean_correction=False"
        )
    kept = search_blocks(query, key, config, variant=variant, scale=scale, last_chunk=last_chunk, means=means)
    variant = check_variant(variant, query, key)
    if is_recording():
        scale = resolve_scale(scale, query.shape[3])
        setting = resolve_config(config, variant)
        note_attention(PlainAttention(query, key, scale, variant, plain_mods(mask_mod)), setting)
    hiding = hiding_masks(variant, kept.words, kept.geometry)
    return block_mask_under(kept, (*hiding, *masks_of(mask_mod, kept.words, kept.geometry)), buffers)
