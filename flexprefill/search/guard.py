"""The guard: heads whose kept blocks hold too little of the attention mass keep all of theirs.

For a few query rows of each head, spread evenly over those that may drop blocks, the exact mass that the kept blocks
hold is computed. A head whose mean, less a margin for what a sample does not see, is below the asked recall keeps every
causal block. The device decides: nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexprefill.blockmap.bits import pack_bits, unpack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks
from flexprefill.blockmap.map import BlockMap, check_block_map
from flexprefill.config import PrefillConfig, check_config
from flexprefill.runtime.listeners import note_guard
from flexprefill.runtime.operators import operator
from flexprefill.search.rule import Sampling
from flexprefill.variant.inputs import check_attention_inputs, check_last_chunk, resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN

SAMPLED_ROWS, FEWER_SAMPLED_ROWS = 64, 32  # sampled of each head
FEWER = range(2**15, 2**16)  # keys with which 64 would cost more than a twentieth of the attention
MARGIN = 2.0  # standard errors of the mean that are taken off it


@dataclass(frozen=True, eq=False)
class GuardReport:
    """What the guard saw and did.

    Attributes:
        recall: float32 [B, Hq], the share of the exact attention mass of the sampled rows that the blocks found by the
            search hold, on average over the rows.
        lowest: float32 [B, Hq], the least share of a sampled row.
        widened: bool [B, Hq], the heads that keep all blocks instead.
        guard: the recall that was asked for.
    """

    recall: Tensor
    lowest: Tensor
    widened: Tensor
    guard: float

    def __str__(self) -> str:
        """How many heads were widened, and the least recall; waits for the device."""
        return (
            f"{int(self.widened.sum())} of {self.widened.numel()} heads keep all blocks: recall below {self.guard:g}; "
            f"the least was {self.recall.min().item():.3f}"
        )


def guard_blocks(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    config: PrefillConfig,
    *,
    scale: float | None = None,
    last_chunk: bool = True,
) -> tuple[BlockMap, GuardReport]:
    """A map of the same blocks, but all causal ones for heads whose recall is below ``config.guard``; and a report.

    What :func:`search_blocks` and :func:`prefill_attention` do by themselves where ``config.guard`` is set, for a map
    that is already there.

    Args:
        query: [B, Hq, S_q, D], the last S_q of the S_kv positions; key: [B, Hkv, S_kv, D].
        block_map: [B, Hq, M, N] of these lengths.
        config: ``guard`` is the recall to keep, ``last_full_blocks`` says which query blocks need no guard, and with
            ``mask_heads="kv"`` the query heads of a key head are widened together.
        scale, last_chunk: as in :func:`search_blocks`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_attention_inputs(query, key)
    check_config(config)
    check_last_chunk(last_chunk)
    check_block_map(block_map, query, key)
    if config.guard is None:
        raise ValueError("config.guard must be the recall to keep, in (0, 1), got None")
    implementation = "triton" if query.is_cuda else "reference"
    scale = resolve_scale(scale, query.shape[3])
    return guard_checked(query, key, block_map, config, scale, last_chunk, implementation)


def guard_checked(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    config: PrefillConfig,
    scale: float,
    last_chunk: bool,
    implementation: str,
) -> tuple[BlockMap, GuardReport]:
    """As :func:`guard_blocks`, of arguments that are known to fit together, by "reference" or "triton"."""
    assert config.guard is not None
    full_blocks = config.last_full_blocks if last_chunk else 0
    words, recall, lowest, widened = guard_words(
        query,
        key,
        block_map.words,
        block_map.block_size,
        full_blocks,
        config.mask_heads == "kv",
        config.guard,
        scale,
        implementation,
    )
    report = GuardReport(recall, lowest, widened, config.guard)
    note_guard(report)
    return replace(block_map, words=words), report


@operator("flexprefill::guard_words")
def guard_words(
    query: Tensor, key: Tensor, words: Tensor, block_size: int, full_blocks: int, kv_masks: bool, guard: float,
    scale: float, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The guarded words, and recall, lowest and widened of a GuardReport.

    Args:
        words: int32 [B, Hq, M, ceil(N / 32)], a BlockMap's.
        full_blocks: query blocks at the end that keep everything.
        kv_masks: widens the query heads of a key head together.
    """
    # an empty sample would say nothing: of queries that all keep everything the first block's rows are taken
    rows = min(query.shape[2], max(words.shape[2] - full_blocks, 1) * block_size)
    sampling = Sampling(rows, FEWER_SAMPLED_ROWS if key.shape[2] in FEWER else SAMPLED_ROWS, guard, MARGIN, kv_masks)
    if implementation == "reference":
        return _guard_words(PlainAttention(query, key, scale, PLAIN), words, block_size, sampling)
    from flexprefill.search.kernels import guard as guard_kernel  # imports triton

    with torch.cuda.device_of(query):
        return guard_kernel.guard_words(query, key, words, block_size, scale, sampling)


@torch.library.register_fake("flexprefill::guard_words")
def _(query, key, words, *_):
    of_heads = query.new_empty(query.shape[:2], dtype=torch.float32)
    return torch.empty_like(words), of_heads, torch.empty_like(of_heads), torch.empty_like(of_heads, dtype=torch.bool)


def sampled_rows(rows: int, samples: int = SAMPLED_ROWS) -> Tensor:
    """The sampled of so many query rows, evenly spread: int64 [samples]; fewer rows than that come more than once."""
    return (2 * torch.arange(samples, device="cpu") + 1) * rows // (2 * samples)


def _guard_words(
    attention: PlainAttention, words: Tensor, block_size: int, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, q_len, _), kv_len, group = attention.query.shape, attention.key.shape[2], attention.group
    geometry, device = Geometry(q_len, kv_len, block_size), words.device
    rows = sampled_rows(sampling.rows, sampling.samples).to(device)
    shares = torch.empty(batch, heads, sampling.samples, device=device, dtype=torch.float32)
    for b in range(batch):
        for first in range(0, heads, group):  # one key head at a time bounds the memory
            own = slice(first, first + group)
            logits = attention.logits(slice(b, b + 1), own, rows, slice(0, kv_len))[0]  # [g, samples, S_kv]
            kept = unpack_bits(words[b, own][:, rows // block_size], geometry.columns)
            shares[b, own] = (logits.softmax(-1) * kept.repeat_interleave(block_size, -1)[..., :kv_len]).sum(-1)
    recall = shares.mean(-1)
    error = ((shares - recall[..., None]).square().mean(-1) / sampling.samples).sqrt()
    widened = ~(recall - sampling.margin * error >= sampling.guard)  # also where a share is NaN
    if sampling.kv_masks:
        widened = widened.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1)
    causal = pack_bits(causal_blocks(geometry, device))
    guarded = torch.where(widened[..., None, None], causal, words)
    return guarded, recall, shares.amin(-1), widened
