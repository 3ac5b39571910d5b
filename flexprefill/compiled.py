"""flex_attention under torch.compile: one compiled function for each kind of call, kept for the process."""

from __future__ import annotations

import functools
import re
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
from flexprefill.score_mods import ScoreMod
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
    mask_mods: tuple[MaskMod, ...] = (),
    score_mods: tuple[ScoreMod, ...] = (),
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """FlexAttention over listed blocks, compiled; inside a caller's own torch.compile, a part of its graph.

    Args:
        lists, offset: what lists_of and query_offset give for a map.
        mask_mods: besides the causal one.
        score_mods: applied one after the other.
        others: as in prefill_attention, checked.

    Raises:
        FlexPrefillError: torch.compile would not run, or finds no C++ compiler; see prefill_attention.
    """
    # grad mode decides whether flex writes a log-sum-exp that nobody reads
    with torch.no_grad():
        if is_tracing():
            inputs = (query, key, value, lists, offset, mask_mods, score_mods)
            return _attend(*inputs, block_size, scale, kernel_options, return_aux)
        query, key, value = map(_of_a_common_kind, (query, key, value))
        inputs = (query, key, value, lists, offset, mask_mods, score_mods)
        signature = Signature(
            query.device.type,
            query.dtype,
            (_layout(query), _layout(key), _layout(value)),
            query.shape[1],
            key.shape[1],
            query.shape[3],
            value.shape[3],
            offset is not None,
            tuple(map(_code_of, mask_mods)),
            tuple(map(_code_of, score_mods)),
            block_size,
            scale,
            kernel_options,
            return_aux,
        )
        try:
            # threads that call one function while it is compiled would each compile it, up to the recompile limit
            with _turns.setdefault(signature, threading.Lock()):
                return _call(signature, inputs)
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
    mask_codes: tuple[types.CodeType | type, ...]
    score_codes: tuple[types.CodeType | type, ...]
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


NAMES = 8  # that inputs get in turn, where torch mixes sizes up
_name_of: dict[Signature, int] = {}  # the one that compiled, if not the first
_turns: dict[Signature, threading.Lock] = {}


def _call(signature: Signature, inputs: tuple[Any, ...]) -> Tensor | tuple[Tensor, Any]:
    """The compiled attention, under another name for its inputs where torch generates C++ that does not compile.

    Its C++ attention names two sizes by replacing text, which also hits any other size whose name begins alike (torch
    2.13). Names of sizes are drawn from those of the inputs.
    """
    while True:
        name = _name_of.get(signature, 0)
        try:
            return _compiled(signature, name)(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not re.search(r"cur_(q|kv)SplitSize\d", str(error)) or name == NAMES - 1:
                raise
            _name_of[signature] = name + 1


def _code_of(mod: Callable[..., Tensor]) -> types.CodeType | type:
    return getattr(mod, "__code__", type(mod))


@functools.cache
def _compiled(signature: Signature, name: int) -> Attend:
    # out of the signature: guards on locals are cheaper
    block_size, scale, return_aux = signature.block_size, signature.scale, signature.return_aux
    kernel_options = signature.kernel_options

    def attend(*inputs: Any) -> Tensor | tuple[Tensor, Any]:
        return _attend(*inputs, block_size, scale, kernel_options, return_aux)

    # torch.compile counts recompiles by code object: one each, so that models do not use up each other's
    code = attend.__code__.replace(co_varnames=(f"inputs_{name}",))
    return torch.compile(types.FunctionType(code, attend.__globals__, closure=attend.__closure__), fullgraph=True)


def _chained(score_mods: tuple[ScoreMod, ...]) -> ScoreMod | None:
    """One score_mod of several."""
    if len(score_mods) < 2:
        return score_mods[0] if score_mods else None

    def chained(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for score_mod in score_mods:
            score = score_mod(score, b, h, q_idx, kv_idx)
        return score

    return chained


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    offset: Tensor | None,
    mask_mods: tuple[MaskMod, ...],
    score_mods: tuple[ScoreMod, ...],
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
        score_mod=_chained(score_mods),
        # made in here: a BlockMask that comes from outside costs a guard for each of its attributes, every call
        block_mask=block_mask_of(lists, (query.shape[2], key.shape[2]), block_size, offset, mask_mods),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=dict(kernel_options),
        return_aux=return_aux,
    )
