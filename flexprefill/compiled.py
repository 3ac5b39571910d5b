"""flex_attention under torch.compile: one compiled function for each kind of call, kept for the process."""

from __future__ import annotations

import functools
import threading
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
from flexprefill.tracing import is_tracing

Attend = Callable[..., "Tensor | tuple[Tensor, Any]"]
Layout = tuple[tuple[int, ...], tuple[bool, ...]]


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
    # grad mode decides whether flex writes a log-sum-exp that nobody reads
    with torch.no_grad():
        if is_tracing():
            inputs = (query, key, value, lists, offset, mask_mod, score_mod)
            return _attend(*inputs, block_size, scale, kernel_options, return_aux)
        query, key, value = map(_of_a_common_kind, (query, key, value))
        inputs = (query, key, value, lists, offset, mask_mod, score_mod)
        attend, alone = _compiled(
            Signature(
                query.device.type,
                query.dtype,
                (_layout(query), _layout(key), _layout(value)),
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
            with alone:
                return attend(*inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise FlexPrefillError(
                "torch.compile's recompile limit is hit: this attention was compiled for more than "
                f"{torch._dynamo.config.recompile_limit} variants of lengths, batch sizes, strides, or numbers that a "
                "mod closes over. Let mods close over tensors, or raise torch._dynamo.config.recompile_limit. "
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
    """What flex_attention compiles statically; lengths, batch sizes and the other strides become dynamic."""

    device_type: str
    dtype: torch.dtype
    layouts: tuple[Layout, Layout, Layout]  # of query, key and value
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


def _of_a_common_kind(tensor: Tensor) -> Tensor:
    """A plain tensor whose last stride is 1: every other kind would be compiled for once more."""
    if tensor.requires_grad or type(tensor) is not Tensor:
        tensor = tensor.detach()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _layout(tensor: Tensor) -> Layout:
    """The dimensions by their strides, and which of them have none."""
    strides = tensor.stride()
    return tuple(sorted(range(4), key=strides.__getitem__)), tuple(stride == 0 for stride in strides)


def _code_of(mod: Callable[..., Tensor] | None) -> types.CodeType | type:
    return getattr(mod, "__code__", type(mod))


_making = threading.Lock()


def _compiled(signature: Signature) -> tuple[Attend, threading.Lock]:
    """The compiled function of a kind of call, and the lock to call it under.

    Threads that call one function at once while it is compiled would each compile it, and each time counts towards
    the recompile limit.
    """
    with _making:
        return _compiled_once(signature)


@functools.cache
def _compiled_once(signature: Signature) -> tuple[Attend, threading.Lock]:
    # out of the signature: guards on locals are cheaper
    block_size, scale, return_aux = signature.block_size, signature.scale, signature.return_aux
    kernel_options = signature.kernel_options

    def attend(*inputs: Any) -> Tensor | tuple[Tensor, Any]:
        return _attend(*inputs, block_size, scale, kernel_options, return_aux)

    # torch.compile counts recompiles by code object: one each, so that models do not use up each other's
    code = attend.__code__.replace()
    own = types.FunctionType(code, attend.__globals__, closure=attend.__closure__)
    return torch.compile(own, fullgraph=True), threading.Lock()


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
    if not is_tracing():
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
