"""The guard: a head keeps all blocks if its kept blocks would hold too little of the attention mass.

It samples a few query rows of each head, spread evenly over those that may drop blocks. For each it computes the exact
mass that the kept blocks hold. It takes the mean over a head's rows, less a margin for what the sample does not see. If
that is below the asked recall, the head keeps every causal block. The device decides, so nothing waits.
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

SAMPLED_ROWS, FEWER_SAMPLED_ROWS = 64, 32  # of each head
FEWER = range(2**15, 2**16)  # numbers of keys for which 64 would cost more than a twentieth of the attention
MARGIN = 2.0  # standard errors of the mean that are taken off it


@dataclass(frozen=True, eq=False)
class GuardReport:
    """What the guard saw and did.

    Attributes:
        recall: The mean share of the attention mass that the found blocks hold, over the sampled rows. float32 [B, Hq].
        lowest: The least share of a sampled row. float32 [B, Hq].
        widened: The heads that keep all blocks instead. bool [B, Hq].
        guard: The recall that was asked for.
    """

    recall: Tensor
    lowest: Tensor
    widened: Tensor
    guard: float

    def __str__(self) -> str:
        """How many heads were widened, and the least recall. Waits for the device."""
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
    """Widens a map: heads whose recall is below ``config.guard`` keep all causal blocks. Also gives a report.

    `search_blocks` and `prefill_attention` do this by themselves where ``config.guard`` is set. This function is for a
    map that is already there.

    Args:
        query: [B, Hq, S_q, D]. Queries are the last S_q of the S_kv positions.
        key: [B, Hkv, S_kv, D].
        block_map: [B, Hq, M, N] of these lengths.
        config: ``guard`` is the recall to keep. ``last_full_blocks`` says which query blocks need no guard. With
            ``mask_heads="kv"`` the query heads of a key head are widened together.
        scale: Factor on the dot products. None is 1 / sqrt(D).
        last_chunk: Whether these queries end the prompt, as in `search_blocks`.

    Returns:
        The widened map and a GuardReport.

    Raises:
        TypeError: An argument has the wrong type or dtype. The message names it.
        ValueError: An argument does not fit. The message names it.
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
    """As `guard_blocks`, for arguments that were checked, by "reference" or "triton"."""
    assert config.guard is not None
    full_blocks = config.last_full_blocks if last_chunk else 0
    asked = full_blocks, config.mask_heads == "kv", config.guard, scale, implementation
    words, recall, lowest, widened = guard_words(query, key, block_map.words, block_map.block_size, *asked)
    report = GuardReport(recall, lowest, widened, config.guard)
    note_guard(report)
    return replace(block_map, words=words), report


def guard_measured(
    block_map: BlockMap, held: Tensor, config: PrefillConfig, full_blocks: int, kv_heads: int
) -> tuple[BlockMap, GuardReport]:
    """As `guard_blocks`, by shares that are known already.

    Args:
        block_map: [B, Hq, M, N].
        held: The share of its attention that each query block keeps, by rows of a sample, float32 [B, Hq, M].
        config: ``guard`` is the recall to keep.
        full_blocks: Query blocks at the end that keep everything. They are not counted.
        kv_heads: Hkv.
    """
    assert config.guard is not None
    counted = held[:, :, : max(held.shape[2] - full_blocks, 1)]
    group = held.shape[1] // kv_heads if config.mask_heads == "kv" else 1
    words, recall, lowest, widened = _widen(counted, block_map.words, block_map.geometry, config.guard, MARGIN, group)
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
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        words: A BlockMap's, int32 [B, Hq, M, ceil(N / 32)].
        block_size: The map's.
        full_blocks: Query blocks at the end that keep everything.
        kv_masks: Widens the query heads of a key head together.
        guard: The recall that was asked for.
        scale: Factor on the dot products.
        implementation: "reference" or "triton".
    """
    # if all query blocks keep everything, the first one's rows are sampled: an empty sample would say nothing
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
    """The rows sampled of ``rows`` query rows, evenly spread: int64 [samples]. If there are fewer, some come again."""
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
    return _widen(shares, words, geometry, sampling.guard, sampling.margin, group if sampling.kv_masks else 1)


def _widen(
    shares: Tensor, words: Tensor, geometry: Geometry, guard: float, margin: float, together: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The guarded words, recall, lowest and widened, from shares of samples [B, Hq, samples].

    So many neighbouring heads are widened together.
    """
    recall = shares.mean(-1)
    error = ((shares - recall[..., None]).square().mean(-1) / shares.shape[2]).sqrt()
    widened = ~(recall - margin * error >= guard)  # also where a share is NaN
    if together > 1:
        widened = widened.unflatten(1, (-1, together)).any(2).repeat_interleave(together, 1)
    causal = pack_bits(causal_blocks(geometry, words.device))
    guarded = torch.where(widened[..., None, None], causal, words)
    return guarded, recall, shares.amin(-1), widened
