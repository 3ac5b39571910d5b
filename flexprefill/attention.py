"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill.backends import BackendChoice, Request, choose_backend
from flexprefill.blockmap import BlockMap
from flexprefill.checks import check_attention_inputs, check_block_map, check_config, resolve_scale
from flexprefill.compiled import flex_over
from flexprefill.config import PrefillConfig
from flexprefill.flex import MaskMod
from flexprefill.lists import ListBuffers
from flexprefill.lse import flash_lse_factor
from flexprefill.recording import note
from flexprefill.search import search_blocks

logger = logging.getLogger("flexprefill")


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
    buffers: ListBuffers | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """Causal attention of a prompt over the blocks that matter: exact softmax over the kept blocks alone.

    The compiled flex_attention is made once a process for each combination of device, dtype, heads, head
    dimensions, block size, scale, backend and mods, and kept; the first call of a kind therefore compiles for some
    seconds. It traces inside a caller's own ``torch.compile(fullgraph=True)``. :func:`explain_backend` says which
    kernel runs; so does each call in the log ``flexprefill`` at level DEBUG.

    Args:
        query: [B, Hq, S_q, D], the last S_q of the S_kv positions; float16, bfloat16 or float32.
        key: [B, Hkv, S_kv, D]; Hq a multiple of Hkv.
        value: [B, Hkv, S_kv, Dv]; D and Dv multiples of 8 from 16 to 256.
        config: the rule's settings; not used if ``block_map`` is given.
        block_map: a map to use instead of a search, [B, Hq, M, N] of these lengths.
        mask_mod: a further mask_mod that hides elements inside the kept blocks.
        score_mod: FlexAttention's score_mod; the search does not know of it.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        last_chunk: whether these queries end the prompt, as in :func:`search_blocks`.
        backend: "triton" (CUDA), "flash" (a Hopper GPU with the package flash-attn-4), or "auto": on CUDA flash where
            it can do the request and there are no mods, else triton; FlexAttention's own C++ kernel on the CPU.
        return_aux: as in flex_attention; not on the CPU. FlashAttention-4's log-sum-exp is checked on the device at
            the first use, which waits for it, and corrected where torch scales it wrongly.
        buffers: memory for the index lists, shared by calls that follow each other on one stream; not inside
            torch.compile.

    Returns:
        [B, Hq, S_q, Dv], and with ``return_aux`` a pair of it and flex_attention's AuxOutput.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: the backend cannot run here; no C++ compiler is found, which the CPU needs; or
            torch.compile would not run (its recompile limit is hit, or it is switched off), and FlexAttention
            would then ignore the mask and be dense; or FlashAttention-4 gives a wrong log-sum-exp.
    """
    scale = _check(query, key, value, config, block_map, mask_mod, score_mod, scale)
    choice = _choose(query, key, value, config, block_map, mask_mod, score_mod, scale, backend, return_aux)
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("prefill_attention of %s over %s: %s", list(query.shape), list(key.shape), choice)
    if block_map is None:
        block_map = search_blocks(query, key, config, scale=scale, last_chunk=last_chunk)
    note(block_map)
    result = flex_over(
        query,
        key,
        value,
        block_map,
        scale=scale,
        kernel_options=choice.kernel_options,
        mask_mod=mask_mod,
        score_mod=score_mod,
        return_aux=return_aux,
        buffers=buffers,
    )
    if choice.name == "flash" and return_aux is not None and return_aux.lse:
        output, aux = result
        return output, aux._replace(lse=aux.lse * flash_lse_factor(query.device))
    return result


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    block_map: BlockMap | None = None,
    mask_mod: MaskMod | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_aux: AuxRequest | None = None,
) -> BackendChoice:
    """What would compute :func:`prefill_attention` of the same arguments, with which options, and why not by others.

    Nothing is searched or attended.

    Args: as in :func:`prefill_attention`.

    Raises:
        TypeError, ValueError, FlexPrefillError: as :func:`prefill_attention`, where it would not run.
    """
    scale = _check(query, key, value, config, block_map, mask_mod, score_mod, scale)
    return _choose(query, key, value, config, block_map, mask_mod, score_mod, scale, backend, return_aux)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig,
    block_map: BlockMap | None,
    mask_mod: MaskMod | None,
    score_mod: Callable[..., Tensor] | None,
    scale: float | None,
) -> float:
    """Raises unless the arguments fit together; returns the scale."""
    check_attention_inputs(query, key, value)
    check_config(config)
    for name, function in (("mask_mod", mask_mod), ("score_mod", score_mod)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of FlexAttention's kind, got {type(function).__name__}")
    if block_map is not None:
        check_block_map(block_map, query, key)
    return resolve_scale(scale, query.shape[3])


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PrefillConfig,
    block_map: BlockMap | None,
    mask_mod: MaskMod | None,
    score_mod: Callable[..., Tensor] | None,
    scale: float,
    backend: str,
    return_aux: AuxRequest | None,
) -> BackendChoice:
    request = Request.of(
        query,
        key,
        value,
        block_size=config.block_size if block_map is None else block_map.block_size,
        mods=mask_mod is not None or score_mod is not None,
        scale=scale,
        lse=return_aux is not None and return_aux.lse,
        max_scores=return_aux is not None and return_aux.max_scores,
    )
    return choose_backend(backend, request)
