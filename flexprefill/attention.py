"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from flexprefill.backends import BackendChoice, Request, choose_backend, choose_dense, measured_dense_below
from flexprefill.blockmap import BlockMap, ceil_div
from flexprefill.checks import (
    MASK_MOD_ARGUMENTS,
    SCORE_MOD_ARGUMENTS,
    check_attention_inputs,
    check_block_map,
    check_config,
    check_last_chunk,
    check_mod,
    resolve_scale,
)
from flexprefill.compiled import flex_over
from flexprefill.config import PrefillConfig
from flexprefill.dense import DENSE_KERNELS, dense_attention
from flexprefill.flex import MaskMod, cut_by, lists_of, offsets_at, query_offset
from flexprefill.lists import ListBuffers
from flexprefill.log_sum_exp import add_sinks, log_sum_exp_over
from flexprefill.lse import flash_lse_factor
from flexprefill.mean_correction import add_dropped_blocks
from flexprefill.not_finite import mark_rows_not_finite
from flexprefill.recording import is_recording, note
from flexprefill.score_mods import ScoreMod, alibi_mod, soft_cap_mod
from flexprefill.search import KeyMeans, search_checked
from flexprefill.search.means import check_means
from flexprefill.search.scorers import find_scorer
from flexprefill.sequences import Sequences
from flexprefill.tail import TAIL_SPLIT_FROM, flex_in_parts, parts_for
from flexprefill.terms import Terms, check_per_head
from flexprefill.tracing import is_tracing

logger = logging.getLogger("flexprefill")


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
    means: KeyMeans | None = None,
    buffers: ListBuffers | None = None,
    sequences: Sequences | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Any]:
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
        sequences, sliding_window, soft_cap, alibi_slopes: as in :func:`search_blocks`, for search and attention.
            Rows of padding output zeros.
        sinks: float [Hq], on query's device: a learned logit of each head that takes part in its softmax and has no
            value (gpt-oss). ``aux.lse`` is without it.

    Returns:
        [B, Hq, S_q, Dv], and with ``return_aux`` a pair of it and flex_attention's AuxOutput.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: the backend cannot run here; no C++ compiler is found, which the CPU needs; or
            torch.compile would not run (its recompile limit is hit, or it is switched off), and FlexAttention
            would then ignore the mask and be dense; or FlashAttention-4 gives a wrong log-sum-exp.
        NotEnoughMemoryError: the search or its index lists do not fit into the device's memory.
    """
    call = _Call.checked(
        *(query, key, value, config, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux),
        *(sequences, sliding_window, soft_cap, alibi_slopes, sinks),
    )
    check_means(means)
    choice = _choose(call)
    if not is_tracing() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("prefill_attention of %s over %s: %s", list(query.shape), list(key.shape), choice)
    if choice.name in DENSE_KERNELS:
        return dense_attention(query, key, value, scale=call.scale, kernel=choice.name)
    if choice.dense:
        block_map = all_blocks(query, key, config.block_size)
    elif block_map is None:
        block_map = search_checked(query, key, config, call.scale, last_chunk, "auto", means, call.terms)
    if sequences is not None:
        # a weight of zero times what is not finite would be NaN
        value = value.masked_fill(sequences.padding[:, None, :, None], 0)
    block_map, cut = cut_by(block_map, mask_mod, sequences, call.terms.sliding_window)
    if not choice.dense:
        note(block_map)
    correct = config.mean_correction and not choice.dense
    aux_request = call.aux_request(correct)
    lse = aux_request is not None and aux_request.lse
    factor = flash_lse_factor(query.device) if choice.name == "flash" and (lse or choice.tail_parts > 1) else 1.0
    settings = {"scale": call.scale, "kernel_options": choice.kernel_options, "return_aux": aux_request}
    score_mods = call.score_mods(block_map)
    # what hides and changes logits, as far as there are names for it, and the caller's own
    terms = cut.first, call.terms.soft_cap, call.terms.alibi_slopes
    own = cut.mask_mods if cut.first is None else cut.mask_mods[1:], () if score_mod is None else (score_mod,)
    if choice.tail_parts > 1:
        split = {"rows": config.last_full_blocks, "parts": choice.tail_parts, "lse_factor": factor}
        result = flex_in_parts(query, key, value, block_map, buffers=buffers, **split, **settings)
    else:
        blocks = lists_of(block_map, cut, buffers), query_offset(block_map)
        mods = {"mask_mods": cut.mask_mods, "score_mods": score_mods}
        result = flex_over(query, key, value, *blocks, block_size=block_map.block_size, **mods, **settings)
        if choice.name == "cpp":
            mark_rows_not_finite(query, key, block_map, result, call.scale, *terms, *own)
    output, aux = (result, None) if aux_request is None else result
    sums = None if aux is None or aux.lse is None else aux.lse * factor if factor != 1 else aux.lse
    if correct:
        output, sums = add_dropped_blocks(query, key, value, block_map, output, sums, scale=call.scale)
    if sinks is not None:
        if sums is None:
            sums = log_sum_exp_over(query, key, block_map, call.scale, *terms, *own)
        output = add_sinks(output, sums, sinks)
    if return_aux is None:
        return output
    return output, aux._replace(lse=sums if return_aux.lse else None)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | BlockMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
    sequences: Sequences | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> BackendChoice:
    """What would compute :func:`prefill_attention` of the same arguments, with which options, and why not by others.

    Nothing is searched or attended.

    Args: as in :func:`prefill_attention`.

    Raises:
        TypeError, ValueError, FlexPrefillError: as :func:`prefill_attention`, where it would not run.
    """
    return _choose(
        _Call.checked(
            *(query, key, value, config, block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux),
            *(sequences, sliding_window, soft_cap, alibi_slopes, sinks),
        )
    )


class _Call(NamedTuple):
    """The checked arguments of a call that decide what computes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    config: PrefillConfig
    block_map: BlockMap | None
    mask_mod: MaskMod | BlockMask | None
    score_mod: ScoreMod | None
    scale: float
    last_chunk: bool
    backend: str
    return_aux: AuxRequest | None
    terms: Terms
    sinks: Tensor | None

    @classmethod
    def checked(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: PrefillConfig,
        block_map: BlockMap | None,
        mask_mod: MaskMod | BlockMask | None,
        score_mod: ScoreMod | None,
        scale: float | None,
        last_chunk: bool,
        backend: str,
        return_aux: AuxRequest | None,
        sequences: Sequences | None,
        sliding_window: int | None,
        soft_cap: float | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> _Call:
        """Raises unless the arguments fit together."""
        check_attention_inputs(query, key, value)
        check_config(config)
        check_last_chunk(last_chunk)
        if not isinstance(mask_mod, BlockMask):
            check_mod("mask_mod", mask_mod, MASK_MOD_ARGUMENTS)
        check_mod("score_mod", score_mod, SCORE_MOD_ARGUMENTS)
        if not (return_aux is None or isinstance(return_aux, AuxRequest)):
            raise TypeError(f"return_aux must be an AuxRequest or None, got {type(return_aux).__name__}")
        find_scorer(config.scorer)
        terms = Terms.checked(query, key, sequences, sliding_window, soft_cap, alibi_slopes)
        if sinks is not None:
            check_per_head("sinks", sinks, query)
        if config.mean_correction:
            max_scores = return_aux is not None and return_aux.max_scores
            others = (("mask_mod", mask_mod is not None), ("score_mod", score_mod), ("max_scores", max_scores))
            for name, asked in (*others, *((name, True) for name in terms.given)):
                if asked:
                    raise ValueError(
                        f"{name} cannot be combined with mean_correction, whose means stand for plain causal "
                        "attention: pass a config with mean_correction=False"
                    )
        if block_map is not None:
            check_block_map(block_map, query, key)
        scale = resolve_scale(scale, query.shape[3])
        asked = block_map, mask_mod, score_mod, scale, last_chunk, backend, return_aux
        return cls(query, key, value, config, *asked, terms, sinks)

    @property
    def gives_lse(self) -> bool:
        """Whether FlexAttention gives log-sum-exps here."""
        return self.query.is_cuda

    @property
    def plain(self) -> bool:
        """Whether any attention kernel can compute it: FlexAttention is not asked for, nor what it alone can do."""
        asked = self.backend != "auto" or self.return_aux is not None
        return not asked and not self.mods and self.sinks is None and self.scale > 0

    @property
    def mods(self) -> bool:
        """Whether FlexAttention gets a mask_mod or a score_mod besides the causal one."""
        return self.mask_mod is not None or self.score_mod is not None or len(self.terms.given) > 0

    def score_mods(self, block_map: BlockMap) -> tuple[ScoreMod, ...]:
        """In the order in which they apply: soft cap, ALiBi, the caller's."""
        mods = []
        if self.terms.soft_cap:
            mods.append(soft_cap_mod(self.query, self.terms.soft_cap))
        if self.terms.alibi_slopes is not None:
            mods.append(alibi_mod(self.terms.alibi_slopes, offsets_at(block_map, block_map.offset)))
        return (*mods, self.score_mod) if self.score_mod is not None else tuple(mods)

    def aux_request(self, correct: bool) -> AuxRequest | None:
        """What FlexAttention has to return besides the output, also for mean correction and sinks."""
        if not self.gives_lse or not (correct or self.sinks is not None):
            return self.return_aux
        return AuxRequest(lse=True, max_scores=self.return_aux is not None and self.return_aux.max_scores)


def _choose(call: _Call) -> BackendChoice:
    request = Request.of(
        call.query,
        call.key,
        call.value,
        block_size=call.config.block_size if call.block_map is None else call.block_map.block_size,
        mods=call.mods,
        scale=call.scale,
        lse=(call.return_aux is not None and call.return_aux.lse)
        or ((call.config.mean_correction or call.sinks is not None) and call.gives_lse),
        max_scores=call.return_aux is not None and call.return_aux.max_scores,
    )
    sparse = _with_tail(call, request, choose_backend(call.backend, request))
    if call.block_map is not None:
        return sparse
    kv_len = call.key.shape[2]
    if call.query.shape[2] == 1 < kv_len and call.last_chunk:
        reason = "a single query that ends the sequence is a step of decoding, which is dense and takes no search"
        if call.plain:
            return BackendChoice("dense-sdpa", reason, dense=True)
        return BackendChoice(sparse.name, reason, True, sparse.kernel_options, sparse.passed_over)
    if not call.plain or is_recording():
        return sparse
    below = call.config.dense_below
    if below is None:
        below = measured_dense_below(request, sparse)
    if kv_len < below:
        return choose_dense(request, f"S_kv is below dense_below, which is {below} here")
    return sparse


def _with_tail(call: _Call, request: Request, sparse: BackendChoice) -> BackendChoice:
    """The choice, its last rows split where that pays and is possible."""
    rows = call.config.last_full_blocks if call.last_chunk else 0
    # lengths are symbols while compiling, and a mod may read the position of a query
    if rows == 0 or request.device.type != "cuda" or request.compiling or request.mods or request.max_scores:
        return sparse
    if call.key.shape[2] < TAIL_SPLIT_FROM or call.query.shape[2] <= rows * request.block_size:
        return sparse
    batch, heads = call.query.shape[:2]
    parts = parts_for(batch * heads * rows, sparse.name, request.value_dim, request.device)
    most = ceil_div(call.key.shape[2], request.block_size) // (rows + 2)
    return replace(sparse, tail_parts=max(1, min(parts, most)))


def all_blocks(query: Tensor, key: Tensor, block_size: int) -> BlockMap:
    """The map of dense causal attention of these tensors."""
    sizes = {"q_len": query.shape[2], "kv_len": key.shape[2], "block_size": block_size}
    return BlockMap.causal(*query.shape[:2], **sizes, device=query.device)
