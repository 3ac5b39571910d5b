"""flex_attention under torch.compile: one compiled function for each kind of call, kept for the process."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

from flexprefill.attention.backends import Options
from flexprefill.blockmap.block_mask import ListedBlocks, block_mask_of
from flexprefill.blockmap.geometry import Geometry
from flexprefill.errors import RanEagerlyError
from flexprefill.runtime.compiling import compile_whole, mixed_up_sizes, refusals_explained
from flexprefill.runtime.state import remembered
from flexprefill.runtime.thread_state import what_graphs_guard, without_autocast, without_dispatch_modes
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.mods import ScoreMod

FlexResult = tuple[Tensor, AuxOutput | None]  # the output and what was asked for besides
Layout = tuple[tuple[int, ...], tuple[bool, ...]]

_making = threading.Lock()  # one compiled function of a kind, whichever thread is first

NAMES = 8  # that inputs get in turn, where torch mixes sizes up


class FlexSettings(NamedTuple):
    """What FlexAttention is told besides its inputs."""

    block_size: int
    scale: float
    kernel_options: Options
    return_aux: AuxRequest | None = None


class Kind(NamedTuple):
    """What flex_attention compiles statically; lengths, batch sizes and the other strides become dynamic."""

    device_type: str
    dtype: torch.dtype
    layouts: tuple[Layout, Layout, Layout]  # of query, key and value
    heads: tuple[int, int]  # of queries and of keys
    dims: tuple[int, int]  # of queries and of values
    at_offset: bool
    mod_codes: tuple[tuple[types.CodeType | type, ...], ...]  # of the mask_mods and of the score_mods
    settings: FlexSettings
    state: tuple[object, ...]  # of the thread: one kind's recompiles are not used up by a state that changes


def flex_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    listed: ListedBlocks,
    settings: FlexSettings,
    score_mods: tuple[ScoreMod, ...] = (),
) -> FlexResult:
    """FlexAttention over listed blocks, compiled; inside a caller's own torch.compile, a part of its graph.

    Args:
        query, key, value: as in prefill_attention, checked.
        score_mods: applied one after the other.

    Raises:
        FlexPrefillError: torch.compile would not run, or finds no C++ compiler; see prefill_attention.
    """
    # grad mode decides whether flex writes a log-sum-exp that nobody reads
    with torch.no_grad(), without_autocast():
        if is_tracing():
            return _attend((query, key, value, *listed, score_mods), settings)
        query, key, value = map(_of_a_common_kind, (query, key, value))
        kind = Kind(
            query.device.type,
            query.dtype,
            (_layout(query), _layout(key), _layout(value)),
            (query.shape[1], key.shape[1]),
            (query.shape[3], value.shape[3]),
            listed.offset is not None,
            (tuple(map(_code_of, listed.mask_mods)), tuple(map(_code_of, score_mods))),
            settings,
            what_graphs_guard(),
        )
        with refusals_explained(), without_dispatch_modes():
            with _making:
                compiled = _compiled(kind)
            return compiled((query, key, value, *listed, score_mods))


def _of_a_common_kind(tensor: Tensor) -> Tensor:
    """A plain tensor whose last stride is 1: every other kind would be compiled for once more."""
    if tensor.requires_grad or type(tensor) is not Tensor:
        tensor = tensor.detach()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _layout(tensor: Tensor) -> Layout:
    """The dimensions by their strides, and which of them have none."""
    strides = tensor.stride()
    return tuple(sorted(range(4), key=strides.__getitem__)), tuple(stride == 0 for stride in strides)


def _code_of(mod: Callable[..., Tensor]) -> types.CodeType | type:
    return getattr(mod, "__code__", type(mod))


class Compiled:
    """The compiled attention of one kind of call.

    Threads that call one function while it is compiled would each compile it, up to the recompile limit: they take
    turns. Where torch generates C++ that does not compile, because it mixes sizes up whose names begin alike, inputs
    get other names, which sizes are named after.
    """

    def __init__(self, settings: FlexSettings) -> None:
        self._settings = settings
        self._turn = threading.Lock()
        self._name = 0
        self._attend = self._compile()

    def _compile(self) -> Callable[..., FlexResult]:
        # on its own: guards on locals are cheaper
        settings = self._settings

        def attend(*inputs: Any) -> FlexResult:
            return _attend(inputs, settings)

        return compile_whole(attend, f"inputs_{self._name}")

    def __call__(self, inputs: tuple[Any, ...]) -> FlexResult:
        with self._turn:
            while True:
                try:
                    return self._attend(*inputs)
                except RanEagerlyError:
                    # torch remembers of a function that it is not to be compiled
                    self._attend = self._compile()
                    raise
                except Exception as error:
                    if not mixed_up_sizes(error) or self._name == NAMES - 1:
                        raise
                    self._name += 1
                    self._attend = self._compile()


@remembered("compiled attention, by kind of call", most=1024)
def _compiled(kind: Kind) -> Compiled:
    return Compiled(kind.settings)


def _chained(score_mods: tuple[ScoreMod, ...]) -> ScoreMod | None:
    """One score_mod of several."""
    if len(score_mods) < 2:
        return score_mods[0] if score_mods else None

    def chained(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for score_mod in score_mods:
            score = score_mod(score, b, h, q_idx, kv_idx)
        return score

    return chained


def _attend(inputs: tuple[Any, ...], settings: FlexSettings) -> FlexResult:
    """flex_attention of (query, key, value, lists, offset, mask_mods, score_mods)."""
    if not is_tracing():
        # reached when torch.compile is off (its environment variable, a stance): eager flex is dense
        raise RanEagerlyError(
            "flex_attention would run without torch.compile, where it ignores the block mask; "
            "switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)"
        )
    query, key, value, lists, offset, mask_mods, score_mods = inputs
    # made in here: a BlockMask that comes from outside costs a guard for each of its attributes, every call
    listed, geometry = (
        ListedBlocks(lists, offset, mask_mods),
        Geometry(query.shape[2], key.shape[2], settings.block_size),
    )
    arguments: dict[str, Any] = {
        "score_mod": _chained(score_mods),
        "block_mask": block_mask_of(listed, geometry),
        "scale": settings.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": dict(settings.kernel_options),
    }
    if settings.return_aux is None:
        return flex_attention(query, key, value, **arguments), None
    return flex_attention(query, key, value, **arguments, return_aux=settings.return_aux)
