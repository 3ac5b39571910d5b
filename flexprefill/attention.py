"""prefill_attention: the search, the BlockMask and the compiled FlexAttention in one call."""

from __future__ import annotations

import functools
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexprefill.blockmap import BlockMap
from flexprefill.checks import check_attention_inputs, check_block_map, check_config, resolve_scale
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError
from flexprefill.flex import MaskMod, to_block_mask
from flexprefill.lists import ListBuffers
from flexprefill.search import search_blocks

BACKENDS = ("auto", "triton", "flash")


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
    dimensions, block size, scale and mods, and kept; the first call of a kind therefore compiles for some seconds. It
    traces inside a caller's own ``torch.compile(fullgraph=True)``.

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
        backend: "triton" (CUDA), "flash" (CUDA with the package flash-attn-4), or "auto": triton on CUDA, and
            FlexAttention's own C++ kernel on the CPU.
        return_aux: as in flex_attention; not on the CPU, nor with "flash".
        buffers: memory for the index lists, shared by calls that follow each other on one stream; not inside
            torch.compile.

    Returns:
        [B, Hq, S_q, Dv], and with ``return_aux`` a pair of it and flex_attention's AuxOutput.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        FlexPrefillError: the backend cannot run here; no C++ compiler is found, which the CPU needs; or
            torch.compile would not run (its recompile limit is hit, or it is switched off), and FlexAttention
            would then ignore the mask and be dense.
    """
    check_attention_inputs(query, key, value)
    check_config(config)
    scale = resolve_scale(scale, query.shape[3])
    for name, function in (("mask_mod", mask_mod), ("score_mod", score_mod)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of FlexAttention's kind, got {type(function).__name__}")
    if block_map is not None:
        check_block_map(block_map, query, key)
    block_size = config.block_size if block_map is None else block_map.block_size
    kernel_options = _kernel_options(backend, query, key, value, block_size, return_aux)
    if block_map is None:
        block_map = search_blocks(query, key, config, scale=scale, last_chunk=last_chunk)
    block_mask = to_block_mask(block_map, mask_mod, buffers)

    # grad mode decides whether flex writes a log-sum-exp that nobody reads
    with torch.no_grad():
        attend = _attend
        if not torch.compiler.is_compiling():
            attend = _compiled_attend(_signature(query, key, value, block_map, scale, mask_mod, score_mod))
        try:
            return attend(query, key, value, score_mod, block_mask, scale, kernel_options, return_aux)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise FlexPrefillError(
                "torch.compile's recompile limit is hit: this attention was compiled for more than "
                f"{torch._dynamo.config.recompile_limit} variants of lengths, batch sizes, or numbers that a mod "
                "closes over. Let mods close over tensors, or raise torch._dynamo.config.recompile_limit. "
                'TORCH_LOGS="recompiles" shows what differed.'
            ) from error
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if "InvalidCxxCompiler" not in str(error):  # it comes wrapped in others
                raise
            raise FlexPrefillError(
                "torch.compile found no C++ compiler, which attention on the CPU needs: install g++ or clang, or "
                "name one in the environment variable CXX"
            ) from error


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask,
    scale: float,
    kernel_options: dict[str, Any],
    return_aux: AuxRequest | None,
) -> Tensor | tuple[Tensor, Any]:
    if not torch.compiler.is_compiling():
        # reached when torch.compile is off (its environment variable, a stance): eager flex is dense
        raise FlexPrefillError(
            "flex_attention would run without torch.compile, where it ignores the block mask; "
            "switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)"
        )
    return flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=kernel_options,
        return_aux=return_aux,
    )


def _signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    scale: float,
    mask_mod: MaskMod | None,
    score_mod: Callable[..., Tensor] | None,
) -> tuple[Any, ...]:
    """What flex_attention compiles statically; lengths and batch sizes become dynamic."""
    shapes = query.shape[1], key.shape[1], query.shape[3], value.shape[3], block_map.block_size
    functions = (getattr(function, "__code__", type(function)) for function in (mask_mod, score_mod))
    return query.device.type, query.dtype, scale, *shapes, block_map.offset > 0, *functions


@functools.cache
def _compiled_attend(signature: tuple[Any, ...]) -> Callable[..., Any]:
    # torch.compile counts recompiles by code object: one each, so that models do not use up each other's
    attend = types.FunctionType(_attend.__code__.replace(), _attend.__globals__)
    return torch.compile(attend, fullgraph=True)


def _kernel_options(
    backend: str, query: Tensor, key: Tensor, value: Tensor, block_size: int, return_aux: AuxRequest | None
) -> dict[str, Any]:
    """FlexAttention's kernel options for a backend, or an error that says why it cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if query.device.type != "cuda":
        if backend != "auto":
            raise FlexPrefillError(f"backend {backend!r} needs tensors on a CUDA device, got {query.device}")
        if return_aux is not None:
            raise FlexPrefillError(f"return_aux is not supported by FlexAttention on {query.device}, got {return_aux}")
        return {}
    if backend == "flash":
        return _flash_options(query, key, value, block_size, return_aux)
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if block_size < 128:
        # a kernel tile must divide the mask's blocks
        options |= {"BLOCK_M": block_size, "BLOCK_N": block_size, "num_warps": 4}
    return options


def _flash_options(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, return_aux: AuxRequest | None
) -> dict[str, Any]:
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise FlexPrefillError("backend 'flash' needs the package flash-attn-4, which is not installed")
    head_dim = max(query.shape[3], value.shape[3])
    if query.dtype == torch.float32 or block_size != 128 or head_dim > 128:
        raise FlexPrefillError(
            "backend 'flash' takes float16 or bfloat16, blocks of 128 and D up to 128, got "
            f"{query.dtype}, block_size={block_size}, D={head_dim}; 'triton' takes them"
        )
    if query.shape[2] != key.shape[2]:
        # the mask_mod's captured offset does not compile in torch 2.11's flash backend
        raise FlexPrefillError(
            "backend 'flash' takes whole prompts only, got "
            f"S_q={query.shape[2]} and S_kv={key.shape[2]}; 'triton' takes queries at an offset"
        )
    if return_aux is not None:
        raise FlexPrefillError(
            "backend 'flash' gives no return_aux here (torch 2.11 returns a wrong log-sum-exp); use 'triton'"
        )
    return {"BACKEND": "FLASH"}
