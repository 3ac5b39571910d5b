"""flex_attention under torch.compile: each kind of call has one compiled function, kept for the process."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention
from torch.nn.functional import pad

from flexprefill.attention.backends import Options
from flexprefill.attention.strides import NO_RULERS, layout_of, ruler_for, stated
from flexprefill.blockmap.block_mask import ListedBlocks, block_mask_of
from flexprefill.blockmap.geometry import Geometry
from flexprefill.errors import RanEagerlyError
from flexprefill.runtime.compiling import compile_whole, mixed_up_sizes, refusals_explained, sizes_may_change
from flexprefill.runtime.state import remembered
from flexprefill.runtime.thread_state import what_graphs_guard, without_autocast, without_dispatch_modes
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.mods import ScoreMod

FlexResult = tuple[Tensor, AuxOutput]  # the output, and what return_aux asks for

_making = threading.Lock()  # a kind has one compiled function, whichever thread is first

# With fewer, FlexAttention's C++ kernel is wrong for 8, 24, 40, … keys that are less than a block (torch 2.11 and 2.13
# on a CPU with AVX2 and without AVX-512)
CPU_LEAST_HEAD_DIM = 24
LSE = AuxRequest(lse=True)
NAMES = 8  # names that inputs get in turn where torch mixes sizes up
FIRST_OVER_PAGES = 3  # torch 2.13 mixes sizes up under the names before it, and takes seconds to say so


def with_lse(aux: AuxOutput, lse: Tensor | None) -> AuxOutput:
    """The same with another log-sum-exp. A graph of torch 2.11 cannot return what a named tuple's _replace gives."""
    return AuxOutput(lse=lse, max_scores=aux.max_scores)


class FlexSettings(NamedTuple):
    """What FlexAttention is told besides its inputs."""

    block_size: int
    scale: float
    kernel_options: Options
    return_aux: AuxRequest | None = None
    piece: int | None = None  # keys of a listed piece, if the keys lie in pages; see blockmap.places


def flex_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    listed: ListedBlocks,
    settings: FlexSettings,
    score_mods: tuple[ScoreMod, ...] = (),
) -> FlexResult:
    """FlexAttention over listed blocks, compiled. Inside a caller's own torch.compile it is a part of that graph.

    Args:
        query: As in prefill_attention, checked.
        key: As in prefill_attention, checked.
        value: As in prefill_attention, checked.
        listed: The kept blocks.
        settings: What FlexAttention is told besides.
        score_mods: Applied one after the other.

    Raises:
        FlexPrefillError: torch.compile would not run, or finds no C++ compiler; see prefill_attention.
    """
    # with gradients on, flex writes a log-sum-exp that nobody reads
    with torch.no_grad(), without_autocast():
        if is_tracing():
            return _attend(((query, key, value), NO_RULERS, *listed, score_mods), settings)
        query, key, value = map(_of_a_common_kind, (query, key, value))
        _let_lengths_change(query, key, value, listed)
        tensors = query, key, value
        # FlashAttention-4 is as fast with strides that it reads at run time
        flash = ("BACKEND", "FLASH") in settings.kernel_options
        # a thread's state that changes must not use up one kind's recompiles
        state = what_graphs_guard()
        rulers = NO_RULERS if flash else tuple(ruler_for(tensor, place, state) for place, tensor in enumerate(tensors))
        layouts = tuple(layout_of(tensor.stride()) for tensor in tensors)
        # what is compiled statically; lengths, batch sizes and strides of heads are dynamic
        kind = (
            query.device.type,
            query.dtype,
            layouts,
            tuple(ruler is None for ruler in rulers),
            (query.shape[1], key.shape[1]),
            (query.shape[3], value.shape[3]),
            (listed.offset is not None, listed.positions is not None),
            _sizes_of_one(query, key, listed),  # torch.compile makes code of its own for each of them
            (tuple(map(_code_of, listed.mask_mods)), tuple(map(_code_of, score_mods))),
            state,
        )
        with refusals_explained(), without_dispatch_modes():
            with _making:
                compiled = _compiled(settings, kind)
            return compiled((tensors, rulers, *listed, score_mods))


def _of_a_common_kind(tensor: Tensor) -> Tensor:
    """A plain tensor of our own, no view, whose last stride is 1. Other kinds would each cost a compilation."""
    if type(tensor) is not Tensor:
        tensor = tensor.detach()
    return tensor.data if tensor.stride(3) == 1 else tensor.data.contiguous()


def _let_lengths_change(query: Tensor, key: Tensor, value: Tensor, listed: ListedBlocks) -> None:
    """Lets one compiled function serve all lengths, and nothing else than lengths be a symbol in it."""
    for tensor in (query, key, value):
        sizes_may_change(tensor, 2)
    counts, indices, full_counts, full_indices = listed.lists
    for of_blocks in (counts, full_counts):
        sizes_may_change(of_blocks, 2)
    for of_blocks in (indices, full_indices):
        sizes_may_change(of_blocks, 2, 3)
    if listed.positions is not None:
        sizes_may_change(listed.positions, 1)


def _sizes_of_one(query: Tensor, key: Tensor, listed: ListedBlocks) -> tuple[bool, ...]:
    """Whether batch, queries, keys, query blocks and key blocks are one."""
    sizes = (query.shape[0], query.shape[2], key.shape[2], *listed.lists[1].shape[2:])
    return tuple(size == 1 for size in sizes)


def _code_of(mod: Callable[..., Tensor]) -> types.CodeType | type:
    return getattr(mod, "__code__", type(mod))


class Compiled:
    """The compiled attention of one kind of call.

    Threads take turns: if several call a function while it is compiled, each compiles it, up to the recompile limit.
    torch may mix up sizes whose names begin alike, and then generates C++ that does not compile. The inputs, after
    which sizes are named, then get other names.
    """

    def __init__(self, settings: FlexSettings) -> None:
        self._settings = settings
        self._turn = threading.Lock()
        self._first = 0 if settings.piece is None else FIRST_OVER_PAGES
        self._tried = 0  # names
        self._attend = self._compile()

    def _compile(self) -> Callable[..., FlexResult]:
        # a local: guards on it are cheaper than on self
        settings = self._settings

        def attend(*inputs: Any) -> FlexResult:
            return _attend(inputs, settings)

        return compile_whole(attend, f"inputs_{(self._first + self._tried) % NAMES}")

    def __call__(self, inputs: tuple[Any, ...]) -> FlexResult:
        with self._turn:
            while True:
                try:
                    return self._attend(*inputs)
                except RanEagerlyError:
                    # torch remembers that this function is not to be compiled: make another one
                    self._attend = self._compile()
                    raise
                except Exception as error:
                    if not mixed_up_sizes(error) or self._tried == NAMES - 1:
                        raise
                    self._tried += 1
                    self._attend = self._compile()


@remembered("compiled attention, by kind of call", most=1024)
def _compiled(settings: FlexSettings, kind: tuple[object, ...]) -> Compiled:
    return Compiled(settings)


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
    """flex_attention of (tensors, rulers, lists, offset, mask_mods, positions, score_mods)."""
    if not is_tracing():
        # torch.compile is off, by its environment variable or a stance: eager flex is dense
        raise RanEagerlyError(
            "flex_attention would run without torch.compile, where it ignores the block mask; "
            "switch torch.compile on again (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)"
        )
    tensors, rulers, lists, offset, mask_mods, positions, score_mods = inputs
    query, key, value = map(stated, tensors, rulers)
    if query.device.type == "cpu" and query.shape[3] < CPU_LEAST_HEAD_DIM:
        missing = CPU_LEAST_HEAD_DIM - query.shape[3]
        query, key = pad(query, (0, missing)), pad(key, (0, missing))  # zeros change no product
    # made in here: a BlockMask from outside costs a guard for each of its attributes, in every call
    listed = ListedBlocks(lists, offset, mask_mods, positions)
    geometry = Geometry(query.shape[2], key.shape[2], settings.block_size)
    arguments: dict[str, Any] = {
        "score_mod": _chained(score_mods),
        "block_mask": block_mask_of(listed, geometry, settings.piece),
        "scale": settings.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": dict(settings.kernel_options),
        "return_aux": settings.return_aux,
    }
    given = flex_attention(query, key, value, **arguments)
    return given if settings.return_aux is not None else (given, AuxOutput())
