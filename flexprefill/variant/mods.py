"""What a variant hides and changes, as FlexAttention's mask_mods and score_mods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill.blockmap.block_mask import Mask, offsets_at
from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.masking import MaskMod
from flexprefill.runtime.compiling import keep_size
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
    # a window alone is said with less than a number for each query
    window = variant.sliding_window if variant.sequences is None else None
    mod = from_first_key(first) if window is None else in_window(words, geometry.offset, window)
    return (Mask(mod, blocks_from(first, geometry)),)


def changing_mods(variant: AttentionVariant, query: Tensor, offset: int) -> tuple[ScoreMod, ...]:
    """The score_mods of a variant for queries that start at a position, in the order in which they apply."""
    mods = []
    if variant.soft_cap is not None:
        mods.append(soft_cap_mod(query, variant.soft_cap))
    if variant.alibi_slopes is not None:
        mods.append(alibi_mod(variant.alibi_slopes, offsets_at(query, offset)))
    return tuple(mods)


def soft_cap_mod(query: Tensor, soft_cap: float) -> ScoreMod:
    """soft_cap · tanh(score / soft_cap)."""
    # a tensor: of a second number torch.compile makes a symbol, which FlexAttention cannot be compiled with
    caps = _of_heads(torch.full((query.shape[1],), soft_cap, dtype=torch.float32, device=query.device))

    def soft_capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return caps[h] * torch.tanh(score / caps[h])

    def soft_capped_by_exp(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # tanh to float32's rounding of 1, as 16 bits need; CUDA's own is several times as many instructions
        return caps[h] * (1 - 2 / (torch.exp(score * (2 / caps[h])) + 1))

    return soft_capped_by_exp if query.is_cuda and query.dtype != torch.float32 else soft_capped


def _of_heads(tensor: Tensor) -> Tensor:
    """[Hq], whose length is not to become a symbol once other calls have other heads: each number compiles anew."""
    if not is_tracing():
        keep_size(tensor, 0)
    return to_capture(tensor)


def alibi_mod(slopes: Tensor, offset: Tensor) -> ScoreMod:
    """score - slope · distance.

    Args:
        slopes: float [Hq].
        offset: int32 [B], the position of the first query.
    """
    slopes = _of_heads(slopes.to(torch.float32, copy=True))  # a copy: what is said of it is not said of the caller's

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx + offset[b] - kv_idx)

    return alibi


def in_window(words: Tensor, offset: int, sliding_window: int) -> MaskMod:
    """mask_mod of queries at an offset of a map's batch that see so many keys, their own the last."""
    floor = offsets_at(words, offset - sliding_window)

    def within_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx > q_idx + floor[b]

    return within_window


def from_first_key(first: Tensor) -> MaskMod:
    """mask_mod of queries that see no key before their first: int32 [1 or B, S_q], see visibility.first_keys."""
    if first.shape[0] == 1:
        # one index costs FlashAttention-4 less than two
        first = to_capture(first[0])

        def not_before(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kv_idx >= first[q_idx]

        return not_before

    first = to_capture(first)

    def not_before_own(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= first[b, q_idx]

    return not_before_own
