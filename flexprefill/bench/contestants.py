"""What is timed: the parts of prefill_attention, the whole call, and dense attentions that compete with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexprefill.attention.prefill import explain_backend, prefill_attention
from flexprefill.bench import floors
from flexprefill.bench.inputs import Case
from flexprefill.bench.timing import reason
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError
from flexprefill.search.blocks import search_blocks
from flexprefill.search.rule import Rule

PART, WHOLE, DENSE = "part", "whole", "dense"


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: The name in tables and pictures.
        kind: PART of prefill_attention, the WHOLE call (the default backend's comes first), or DENSE attention.
        prepare: Makes the call to time on a case. Work that is not timed is done here.
        work: The work that bounds it, if known.
    """

    name: str
    kind: str
    prepare: Callable[[Case], Callable[[], Any]]
    work: Callable[[Case], floors.Work] | None = None


def ready(contestant: Contestant, case: Case) -> Callable[[], Any]:
    """The contestant's call on a case, after a first run, which compiles.

    Raises:
        FlexPrefillError: It cannot run here. The message says why.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call = contestant.prepare(case)
            call()
            if case.query.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            raise FlexPrefillError(reason(error, *_sdpa_reasons(error, said))) from error
    return call


def _sdpa_reasons(error: Exception, said: list[warnings.WarningMessage]) -> list[str]:
    """SDPA's warnings about the backend that was asked for. The error itself only says that there is none."""
    if "No available kernel" not in str(error):
        return []
    messages = [str(warning.message).split(" (Triggered")[0] for warning in said]
    return [text for text in messages if "runtime disabled" not in text and "not used because" not in text]


def sparse_backends(device: torch.device) -> list[str]:
    """The backends of prefill_attention to compare on a device: FlexAttention's own, and flash where it is there."""
    if device.type != "cuda":
        return ["auto"]
    small = torch.zeros(1, 1, 128, 128, device=device, dtype=torch.bfloat16)
    try:
        explain_backend(small, small, small, backend="flash")
    except FlexPrefillError:
        return ["triton"]
    return ["triton", "flash"]


def _pooling(case: Case) -> Callable[[], Any]:
    from flexprefill.search.kernels import launch  # imports triton

    return lambda: launch.pool_keys(case.key, case.config.block_size)


def _scoring(case: Case) -> Callable[[], Any]:
    from flexprefill.search.kernels import launch  # imports triton

    rule = Rule.of(case.config, scale=case.query.shape[3] ** -0.5, last_chunk=True)
    means = launch.pool_keys(case.key, case.config.block_size)
    return lambda: launch.score_words(case.query, means, case.length, rule)


def _search(case: Case) -> Callable[[], Any]:
    return lambda: search_blocks(case.query, case.key, case.config)


def _lists(case: Case) -> Callable[[], Any]:
    return case.block_map.to_block_mask


def _lists_again(case: Case) -> Callable[[], Any]:
    buffers = ListBuffers()
    return lambda: case.block_map.to_block_mask(buffers=buffers)


def _attention(backend: str, case: Case) -> Callable[[], Any]:
    return lambda: prefill_attention(case.query, case.key, case.value, block_map=case.block_map, backend=backend)


def _whole(backend: str, case: Case) -> Callable[[], Any]:
    return lambda: prefill_attention(case.query, case.key, case.value, case.config, backend=backend)


def _two_sided(backend: str, case: Case) -> Callable[[], Any]:
    config = replace(PrefillConfig.recommended(), dense_below=case.config.dense_below)
    return _whole(backend, replace(case, config=config))


def _dense_flex(case: Case) -> Callable[[], Any]:
    everything = case.everything()
    return lambda: prefill_attention(case.query, case.key, case.value, block_map=everything)


def _own_dense(case: Case) -> Callable[[], Any]:
    config = replace(case.config, dense_below=case.length + 1)
    return lambda: prefill_attention(case.query, case.key, case.value, config)


def _sdpa(case: Case) -> Callable[[], Any]:
    return lambda: scaled_dot_product_attention(
        case.query, case.key, case.value, is_causal=True, enable_gqa=case.grouped
    )


def _sdpa_by(backend: SDPBackend, case: Case) -> Callable[[], Any]:
    attend = _sdpa(case)

    def call() -> Any:
        with sdpa_kernel(backend):
            return attend()

    return call


def _flash_attention_4(case: Case) -> Callable[[], Any]:
    try:
        from flash_attn.cute import flash_attn_func
    except ModuleNotFoundError as error:
        raise FlexPrefillError(f"the package flash-attn-4 is not installed: {error}") from error
    query, key, value = (x.transpose(1, 2).contiguous() for x in (case.query, case.key, case.value))  # [1, S, H, D]
    return lambda: flash_attn_func(query, key, value, causal=True)


_FLASH_2 = partial(_sdpa_by, SDPBackend.FLASH_ATTENTION)
_CUDNN = partial(_sdpa_by, SDPBackend.CUDNN_ATTENTION)
# by the name that --only takes
EVERY = {
    "pooling": Contestant("pooling", PART, _pooling, floors.pooling_work),
    "scoring": Contestant("scoring", PART, _scoring, floors.scoring_work),
    "search": Contestant("search", PART, _search),
    "lists": Contestant("lists", PART, _lists, floors.lists_work),
    "lists-buffers": Contestant("lists, buffers", PART, _lists_again),
    "attention": Contestant("attention", PART, partial(_attention, "auto")),
    "attention-triton": Contestant(
        "attention, triton", PART, partial(_attention, "triton"), floors.sparse_attention_work
    ),
    "attention-flash": Contestant("attention, flash", PART, partial(_attention, "flash"), floors.sparse_attention_work),
    "prefill-attention": Contestant("prefill_attention", WHOLE, partial(_whole, "auto"), floors.whole_work),
    "prefill-triton": Contestant("the whole, triton", WHOLE, partial(_whole, "triton"), floors.whole_work),
    "prefill-flash": Contestant("the whole, flash", WHOLE, partial(_whole, "flash"), floors.whole_work),
    "two-sided": Contestant("two-sided", WHOLE, partial(_two_sided, "auto")),
    "two-sided-triton": Contestant("two-sided, triton", WHOLE, partial(_two_sided, "triton")),
    "two-sided-flash": Contestant("two-sided, flash", WHOLE, partial(_two_sided, "flash")),
    "sdpa": Contestant("SDPA", DENSE, _sdpa, floors.dense_attention_work),
    "sdpa-flash": Contestant("SDPA FlashAttention-2", DENSE, _FLASH_2, floors.dense_attention_work),
    "sdpa-cudnn": Contestant("SDPA cuDNN", DENSE, _CUDNN, floors.dense_attention_work),
    "flash-attention-4": Contestant("FlashAttention-4", DENSE, _flash_attention_4, floors.dense_attention_work),
    "own-dense": Contestant("dense_below's dense", DENSE, _own_dense, floors.dense_attention_work),
    "flex-dense": Contestant("FlexAttention dense", DENSE, _dense_flex, floors.dense_attention_work),
}
_ON_CPU = ("search", "lists", "lists-buffers", "attention", "prefill-attention", "sdpa", "flex-dense")

# by device, then by name
CONTESTANTS: dict[str, dict[str, Contestant]] = {
    "cuda": {name: contestant for name, contestant in EVERY.items() if name != "attention"},
    "cpu": {name: EVERY[name] for name in _ON_CPU},
}
