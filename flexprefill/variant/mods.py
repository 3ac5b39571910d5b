"""What a variant hides and changes, as FlexAttention's mask_mods and score_mods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill.blockmap.block_mask import Mask, offsets_at
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.masking import MaskMod
from flexprefill.runtime.compiling import keep_size, sizes_may_change
from flexprefill.runtime.operators import to_capture
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.variant import AttentionVariant
from flexprefill.variant.visibility import blocks_from, first_keys

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def hiding_masks(variant: AttentionVariant, words: Tensor, geometry: Geometry) -> tuple[Mask, ...]:
    """What sequences and a sliding window hide of a map's keys, as masks."""
    first = first_keys(variant.sequences, variant.sliding_window, geometry, words.device)
    if first is None:
        return ()
    # a window alone needs no number for each query
    window = variant.sliding_window if variant.sequences is None else None
    mod = from_first_key(first) if window is None else in_window(words, geometry.offset, window)
    return (Mask(mod, blocks_from(first, geometry)),)


def changing_mods(variant: AttentionVariant, query: Tensor, offset: int) -> tuple[ScoreMod, ...]:
    """The score_mods of a variant for queries that start at ``offset``, in the order in which they apply."""
    mods = []
    if variant.soft_cap is not None:
        mods.append(soft_cap_mod(query, variant.soft_cap))
    if variant.alibi_slopes is not None:
        mods.append(alibi_mod(variant.alibi_slopes, offsets_at(query, offset)))
    return tuple(mods)


def soft_cap_mod(query: Tensor, soft_cap: float) -> ScoreMod:
    """soft_cap · tanh(score / soft_cap)."""
    # a tensor: torch.compile makes a symbol of a second number, and cannot compile FlexAttention with it
    caps = _of_heads(torch.full((query.shape[1],), soft_cap, dtype=torch.float32, device=query.device))

    def soft_capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return caps[h] * torch.tanh(score / caps[h])

    def soft_capped_by_exp(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # tanh to float32's rounding of 1, enough for 16 bits; CUDA's own takes several times as many instructions
        return caps[h] * (1 - 2 / (torch.exp(score * (2 / caps[h])) + 1))

    return soft_capped_by_exp if query.is_cuda and query.dtype != torch.float32 else soft_capped


def _of_heads(tensor: Tensor) -> Tensor:
    """A tensor [Hq] for mods. Its length does not become a symbol when other calls have other heads."""
    if not is_tracing():
        keep_size(tensor, 0)
    return to_capture(tensor)


def _of_queries(tensor: Tensor) -> Tensor:
    """A tensor [..., S_q] for mods, whose length is a symbol at once."""
    if not is_tracing():
        sizes_may_change(tensor, tensor.dim() - 1)
    return to_capture(tensor)


def alibi_mod(slopes: Tensor, offset: Tensor) -> ScoreMod:
    """score - slope · distance.

    Args:
        slopes: float [Hq].
        offset: The position of the first query, int32 [B].
    """
    slopes = _of_heads(slopes.to(torch.float32, copy=True))  # a copy, because the caller's is not to be marked

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx + offset[b] - kv_idx)

    return alibi


def in_window(words: Tensor, offset: int, sliding_window: int) -> MaskMod:
    """mask_mod of queries at an offset that see ``sliding_window`` keys, their own the last. Words give the batch."""
    floor = offsets_at(words, offset - sliding_window)

    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx > q_idx + floor[b]

    return within_window


def from_first_key(first: Tensor) -> MaskMod:
    """mask_mod of queries that see no key before their first. See visibility.first_keys."""
    if first.shape[0] == 1:
        # one index is cheaper than two for FlashAttention-4
        first = _of_queries(first[0])

        def not_before(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kv_idx >= first[q_idx]

        return not_before

    first = _of_queries(first)

    def not_before_own(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= first[b, q_idx]

    return not_before_own
