"""Score functions that the search knows of, as FlexAttention's score_mods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexprefill.operators import to_capture
from flexprefill.tracing import is_tracing

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def soft_cap_mod(query: Tensor, cap: float) -> ScoreMod:
    """cap · tanh(score / cap)."""
    # a tensor: of a second number torch.compile makes a symbol, which FlexAttention cannot be compiled with
    caps = _of_heads(torch.full((query.shape[1],), cap, dtype=torch.float32, device=query.device))

    def soft_capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return caps[h] * torch.tanh(score / caps[h])

    def soft_capped_by_exp(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # tanh to float32's rounding of 1, as 16 bits need; CUDA's own is several times as many instructions
        return caps[h] * (1 - 2 / (torch.exp(score * (2 / caps[h])) + 1))

    return soft_capped_by_exp if query.is_cuda and query.dtype != torch.float32 else soft_capped


def _of_heads(tensor: Tensor) -> Tensor:
    """[Hq], whose length is not to become a symbol once other calls have other heads: each number compiles anew."""
    if not is_tracing():
        torch._dynamo.mark_static(tensor, 0)
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
