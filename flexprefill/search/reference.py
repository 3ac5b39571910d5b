"""The definition of the search in plain PyTorch: float32, any device, written to be read.

B batch, Hq and Hkv query and key heads, g = Hq / Hkv; b block size; M and N query and key blocks, I and J
their indices. Log-scores are in log2.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap import causal_blocks, ceil_div
from flexprefill.search.grid import Grid
from flexprefill.search.rule import Rule

LOG2_E = math.log2(math.e)


def pool_keys(key: Tensor, block_size: int) -> Tensor:
    """Means of the key blocks, taken in float32 and kept in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D].

    A short last block is divided by the keys it has.
    """
    kv_len = key.shape[2]
    columns = ceil_div(kv_len, block_size)
    padded = pad(key.float(), (0, 0, 0, columns * block_size - kv_len))
    sums = rearrange(padded, "B H (N b) D -> B H N b D", b=block_size).sum(3)
    starts = torch.arange(columns, device=key.device) * block_size
    sizes = (kv_len - starts).clamp(max=block_size)
    return (sums / sizes[:, None]).to(key.dtype)


def log_scores(query: Tensor, means: Tensor, grid: Grid) -> Tensor:
    """log2 of each block's score, up to no constant: L_IJ = log2 of the sum over rows q of 2^(s[q, J]).

    Args:
        query: [B, Hq, S_q, D]; means: [B, Hkv, N, D].

    Returns:
        float32 [B, Hq, M, N], -inf where no row gives a score.
    """
    device = query.device
    scores = grid.scoring_rows(device)  # [M, b, N]
    padded = pad(query.float(), (0, 0, 0, grid.rows * grid.block_size - grid.q_len))
    grouped = rearrange(padded, "B (H g) (M b) D -> B H g M b D", H=means.shape[1], b=grid.block_size)
    L = torch.empty(*grouped.shape[:4], grid.columns, device=device, dtype=torch.float32)  # [B, Hkv, g, M, N]
    for batch in range(means.shape[0]):
        for head in range(means.shape[1]):  # one key head at a time bounds the memory
            s = (grid.scale * LOG2_E) * (grouped[batch, head] @ means[batch, head].float().T)  # [g, M, b, N]
            L[batch, head] = log2_sum(torch.where(scores, s, -torch.inf), 2)
    return rearrange(L, "B H g M N -> B (H g) M N")


def log2_sum(logs: Tensor, dim: int) -> Tensor:
    """log2 of the sum of 2^logs along a dimension; NaN where one is."""
    m = logs.amax(dim, keepdim=True)
    shift = torch.where(m.isinf(), 0, m)  # -inf - -inf would be NaN
    return shift.squeeze(dim) + torch.log2(torch.exp2(logs - shift).sum(dim))


def select_blocks(L: Tensor, kv_heads: int, grid: Grid, rule: Rule) -> Tensor:
    """The kept blocks, from the log2 scores [B, Hq, M, N]: bool [B, Hq, M, N]. The rule is PrefillConfig's."""
    scored = grid.scored(L.device)
    group = L.shape[1] // kv_heads
    if rule.kv_masks:
        # of all rows of the group's heads
        L = log2_sum(rearrange(L, "B (H g) M N -> B H g M N", g=group), 2)

    # a block whose score is not finite is kept, and takes no part in its row's maximum
    finite = L.isfinite()
    comparable = torch.where(finite, L, -torch.inf)
    best = comparable.amax(-1, keepdim=True)
    keep = scored & (~finite | (L >= best + rule.log2_alpha))
    if rule.min_blocks:
        k = min(rule.min_blocks, L.shape[-1])
        keep |= finite & (L >= comparable.topk(k, dim=-1).values[..., -1:])

    keep = keep | always_kept(grid.q_len, grid.kv_len, rule, L.device)
    return keep.repeat_interleave(group, 1) if rule.kv_masks else keep


def always_kept(q_len: int, kv_len: int, rule: Rule, device: torch.device | str) -> Tensor:
    """The sinks, the window and the last query blocks, kept whatever the scores are: bool [M, N]."""
    causal = causal_blocks(q_len, kv_len, rule.block_size, device)
    I = torch.arange(causal.shape[0], device=device)[:, None]
    J = torch.arange(causal.shape[1], device=device)
    last_visible = causal.sum(-1, keepdim=True) - 1
    last_rows = I >= causal.shape[0] - rule.last_full_blocks
    return causal & ((J < rule.sink_blocks) | (J > last_visible - rule.window_blocks) | last_rows)
