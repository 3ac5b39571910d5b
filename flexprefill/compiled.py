"""flex_attention under torch.compile: one compiled function for each kind of call, kept for the process."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexprefill.backends import Options
from flexprefill.errors import FlexPrefillError
from flexprefill.flex import MaskMod, block_mask_of
from flexprefill.lists import Lists

Attend = Callable[..., "Tensor | tuple[Tensor, Any]"]


def flex_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    offset: Tensor | None,
    *,
    block_size: int,
    scale: float,
    kernel_options: Options,
    mask_mod: MaskMod | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """FlexAttention over listed blocks, compiled; inside a caller's own torch.compile, a part of its graph.

    Args:
        lists, offset: what lists_of and query_offset give for a map.
        others: as in prefill_attention, checked.

    Raises:
        FlexPrefillError: torch.compile would not run, or finds no C++ compiler; see prefill_attention.
    """
    inputs = (query, key, value, lists, offset, mask_mod, score_mod)
    # grad mode decides whether flex writes a log-sum-exp that nobody reads
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return _attend(*inputs, block_size, scale, kernel_options, return_aux)
        attend = _compiled(
            Signature(
                query.device.type,
                query.dtype,
                query.shape[1],
                key.shape[1],
                query.shape[3],
                value.shape[3],
                offset is not None,
                _code_of(mask_mod),
                _code_of(score_mod),
                block_size,
                scale,
                kernel_options,
                return_aux,
            )
        )
        try:
            return attend(*inputs)
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


class Signature(NamedTuple):
    """What flex_attention compiles statically; lengths and batch sizes become dynamic."""

    device_type: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    at_offset: bool
    mask_code: types.CodeType | type
    score_code: types.CodeType | type
    block_size: int
    scale: float
    kernel_options: Options
    return_aux: AuxRequest | None


def _code_of(mod: Callable[..., Tensor] | None) -> types.CodeType | type:
    return getattr(mod, "__code__", type(mod))


@functools.cache
def _compiled(signature: Signature) -> Attend:
    # out of the signature: guards on locals are cheaper
    block_size, scale, return_aux = signature.block_size, signature.scale, signature.return_aux
    kernel_options = signature.kernel_options

    def attend(*inputs: Any) -> Tensor | tuple[Tensor, Any]:
        return _attend(*inputs, block_size, scale, kernel_options, return_aux)

    # torch.compile counts recompiles by code object: one each, so that models do not use up each other's
    code = attend.__code__.replace()
    return torch.compile(types.FunctionType(code, attend.__globals__, closure=attend.__closure__), fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    offset: Tensor | None,
    mask_mod: MaskMod | None,
    score_mod: Callable[..., Tensor] | None,
    block_size: int,
    scale: float,
    kernel_options: Options,
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
        # made in here: a BlockMask that comes from outside costs a guard for each of its attributes, every call
        block_mask=block_mask_of(lists, (query.shape[2], key.shape[2]), block_size, offset, mask_mod),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=dict(kernel_options),
        return_aux=return_aux,
    )
