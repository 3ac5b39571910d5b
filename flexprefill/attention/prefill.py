"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import logging
from typing import overload

from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.call import Call, check_call, check_tensors
from flexprefill.attention.dense import DENSE_KERNELS, dense_attention
from flexprefill.attention.steps import attend_kept, choose, corrected, kept_blocks, visible_blocks_of, with_sinks
from flexprefill.blockmap.block_mask import masks_of
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap, block_mask_under
from flexprefill.blockmap.masking import MaskMod
from flexprefill.config import PrefillConfig, check_config
from flexprefill.runtime.listeners import note
from flexprefill.runtime.thread_state import of_one_dtype
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search.blocks import search_blocks
from flexprefill.search.key_means import KeyMeans, check_means
from flexprefill.variant.mods import ScoreMod, hiding_masks
from flexprefill.variant.variant import AttentionVariant, check_variant

logger = logging.getLogger("flexprefill")


@overload
def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, config: PrefillConfig = ..., *,
    variant: AttentionVariant | None = ..., block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ..., score_mod: ScoreMod | None = ...,
    scale: float | None = ..., last_chunk: bool = ..., backend: str = ...,
    return_aux: None = ..., means: KeyMeans | None = ..., buffers: ListBuffers | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, config: PrefillConfig = ..., *,
    variant: AttentionVariant | None = ..., block_map: BlockMap | None = ...,
    mask_mod: MaskMod | BlockMask | None = ..., score_mod: ScoreMod | None = ...,
    scale: float | None = ..., last_chunk: bool = ..., backend: str = ...,
    return_aux: AuxRequest, means: KeyMeans | None = ..., buffers: ListBuffers | None = ...,
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip
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
        key: [B, Hkv, S_kv, D]; Hq a multiple of Hkv. Under autocast, tensors of several dtypes are cast to its one.
        value: [B, Hkv, S_kv, Dv]; D and Dv multiples of 8 from 16 to 256.
        config: the rule's settings, of which a given ``block_map`` leaves only ``mean_correction``: dropped blocks that
            are seen whole then answer with their mean key and value (docs/explanations/mean_correction.md). Not with
            mods or ``max_scores``.
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
    query, key, value = of_one_dtype(query, key, value)
    scale, variant = check_tensors(query, key, value, scale, variant)
    asked = Call(
        query, key, value, config, variant, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
    )
    call = check_call(asked)
    check_means(means)
    choice = choose(call)
    if not is_tracing() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("prefill_attention of %s over %s: %s", list(query.shape), list(key.shape), choice)
    if choice.name in DENSE_KERNELS:
        return dense_attention(query, key, value, scale=scale, kernel=choice.name)
    kept, cut = visible_blocks_of(call, kept_blocks(call, choice, means))
    if not choice.dense:
        note(kept)
    attended = attend_kept(call, choice, kept, cut, buffers)
    if config.mean_correction and not choice.dense:
        attended = corrected(call, kept, attended)
    if call.variant.sinks is not None:
        attended = with_sinks(call, kept, attended)
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
    query, key, value = of_one_dtype(query, key, value)
    scale, variant = check_tensors(query, key, value, scale, variant)
    asked = Call(
        query, key, value, config, variant, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
    )
    return choose(check_call(asked))


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
