"""The definition of the search in plain PyTorch: float32, any device, written to be read.

B is the batch size. Hq and Hkv are the numbers of query and key heads, and g = Hq / Hkv. b is the block size. M and N
are the numbers of query and key blocks, I and J their indices. Log-scores are in log2.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div
from flexprefill.search.grid import Grid, View
from flexprefill.search.rule import Rule, log2_alphas_on
from flexprefill.variant.logits import LOG2_E, float_products, log2_sum, soft_capped
from flexprefill.variant.sequences import Sequences


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


def pool_own_keys(key: Tensor, block_size: int, sequences: Sequences) -> Tensor:
    """Means of what each sequence has of each key block, taken and kept as `pool_keys` does.

    A block has one mean for each of its sequences. The first N means are those of the sequence at each block's first
    position. The next N are those of the sequence at its last position. Sequences between these have a mean at each of
    their positions.

    Args:
        key: [B, Hkv, S_kv, D].
        block_size: Tokens of a block.
        sequences: The batch's.

    Returns:
        [B, Hkv, N + N + S_kv, D]. Means of padding are not to be used. Neither is a position's mean if its sequence
        reaches an end of the block.
    """
    kv_len = key.shape[2]
    columns = ceil_div(kv_len, block_size)
    missing = columns * block_size - kv_len
    keys = rearrange(pad(key.float(), (0, 0, 0, missing)), "B H (N b) D -> B H N b D", b=block_size)
    starts, ends = (
        rearrange(pad(tensor, (0, missing), value=value), "B (N b) -> B N b", b=block_size)
        for tensor, value in ((sequences.starts, kv_len), (sequences.ends, 0))
    )
    position = torch.arange(columns * block_size, device=key.device).view(columns, block_size)
    last = ((torch.arange(columns, device=key.device) + 1) * block_size).clamp(max=kv_len) - 1
    start_of_last = starts.gather(2, (last % block_size).expand(starts.shape[0], -1)[..., None])
    outside = starts >= ends
    of_first = (position < ends[..., :1]) & ~outside
    of_last = (position >= start_of_last) & ~outside
    pooled = []
    for members in (of_first, of_last):
        chosen = torch.where(members[:, None, ..., None], keys, 0)  # not multiplied: padding may hold NaN
        pooled.append(chosen.sum(3) / members.sum(2).clamp(min=1)[:, None, :, None])
    same = (starts[..., None] == starts[..., None, :]) & ~outside[..., None]  # [1 or B, N, b, b]
    inside = torch.where(outside[:, None, ..., None], 0, keys)
    sums = float_products(same[:, None], inside)
    pooled.append((sums / same.sum(3).clamp(min=1)[:, None, ..., None]).flatten(2, 3)[:, :, :kv_len])
    return torch.cat(pooled, 2).to(key.dtype)


def log_scores(query: Tensor, means: Tensor, grid: Grid) -> Tensor:
    """log2 of each block's score: L_IJ = log2 of the sum over rows q of 2^(s[q, J]).

    s[q, J] is log2(e) · scale · q · K̄_J. K̄_J is the mean of block J's keys. With sequences it is the mean of what q's
    own sequence has of J. A soft cap applies to the product. ALiBi adds the log of the mean of exp(-slope · distance)
    over the keys of J that q sees.

    Args:
        query: [B, Hq, S_q, D].
        means: [B, Hkv, N, D], or what `pool_own_keys` gives where there are sequences.
        grid: The blocks to score.

    Returns:
        float32 [B, Hq, M, N], -inf where no row gives a score.
    """
    padded = pad(query.float(), (0, 0, 0, grid.rows * grid.block_size - grid.q_len))
    grouped = rearrange(padded, "B (H g) (M b) D -> B H g M b D", H=means.shape[1], b=grid.block_size)
    shape = *grouped.shape[:4], grid.columns
    L = torch.full(shape, -torch.inf, device=query.device, dtype=torch.float32)  # [B, Hkv, g, M, N]
    for I, J in grid.pieces():
        view = grid.view(query.device, I, J) if grid.variant.cut or grid.variant.alibi_slopes is not None else None
        scores = grid.scoring_rows(query.device, I, J)
        for batch in range(means.shape[0]):
            entry = None if view is None else View(*(part if part.dim() < 4 else _of(part, batch) for part in view))
            own_scores = _of(scores, batch) if grid.variant.cut else scores
            for head in range(means.shape[1]):  # one key head at a time bounds the memory
                products = _products(grouped[batch, head, :, I], means[batch, head].float(), grid, entry, I, J)
                s = _modified(products, grid, entry, head)
                L[batch, head, :, I, J] = log2_sum(torch.where(own_scores, s, -torch.inf), 2)
    return rearrange(L, "B H g M N -> B (H g) M N")


def _of(tensor: Tensor, batch: int) -> Tensor:
    """A batch entry of what is [1 or B, ...]."""
    return tensor[batch if tensor.shape[0] > 1 else 0]


def _products(queries: Tensor, means: Tensor, grid: Grid, view: View | None, I: slice, J: slice) -> Tensor:
    """Query blocks I [g, m, b, D] times the means of their own sequences in key blocks J: [g, m, b, n]."""
    columns, b = grid.columns, grid.block_size
    of_first = float_products(queries, means[:columns][J].T)
    if grid.variant.sequences is None or view is None:
        return of_first
    of_last = float_products(queries, means[columns : 2 * columns][J].T)
    # a sequence that reaches neither end of the block lies in the rows' own block alone
    alone = means[2 * columns + grid.offset + I.start * b :][: (I.stop - I.start) * b]
    alone = pad(alone, (0, 0, 0, (I.stop - I.start) * b - alone.shape[0])).unflatten(0, (-1, b))
    of_own = (queries * alone).sum(-1, keepdim=True)
    return torch.where(
        view.start <= view.block_start, of_first, torch.where(view.end >= view.block_end, of_last, of_own)
    )


def _modified(products: Tensor, grid: Grid, view: View | None, kv_head: int) -> Tensor:
    """Scores in log2 of products [g, M, b, N] of queries and means."""
    soft_cap, alibi_slopes = grid.variant.soft_cap, grid.variant.alibi_slopes
    if soft_cap is None and alibi_slopes is None:
        return (grid.scale * LOG2_E) * products
    s = soft_capped(grid.scale * products, soft_cap)
    if alibi_slopes is not None:
        assert view is not None  # made wherever there are slopes
        group = products.shape[0]
        slopes = alibi_slopes.float()[kv_head * group : (kv_head + 1) * group].view(-1, 1, 1, 1)
        s = s + alibi_mean(slopes, view.position - view.seen_end + 1, view.seen_end - view.seen_first)
    return LOG2_E * s


def alibi_mean(slopes: Tensor, nearest: Tensor, count: Tensor) -> Tensor:
    """Natural log of the mean of exp(-slope · distance) over ``count`` distances from the nearest on."""
    count = count.clamp(min=1).float()
    # a geometric series, and for a slope of 0 its limit
    ratio = (torch.expm1(-slopes * count) / torch.expm1(-slopes)).log() - count.log()
    return -slopes * nearest + torch.where(slopes == 0, 0, ratio)


def select_blocks(L: Tensor, kv_heads: int, grid: Grid, rule: Rule) -> Tensor:
    """The kept blocks by PrefillConfig's rule, from the log2 scores [B, Hq, M, N]: bool [B, Hq, M, N]."""
    scored = grid.scored(L.device)
    group = L.shape[1] // kv_heads
    if rule.kv_masks:
        # the sum over all rows of the group's heads
        L = log2_sum(rearrange(L, "B (H g) M N -> B H g M N", g=group), 2)

    # a block whose score is not finite is kept, and does not count for its row's best
    finite = L.isfinite()
    comparable = torch.where(finite, L, -torch.inf)
    best = comparable.amax(-1, keepdim=True)
    threshold = best + rule.log2_alpha
    if rule.log2_alphas:
        # heads that share a mask have the same alpha
        threshold = best + log2_alphas_on(L.device, rule)[:: group if rule.kv_masks else 1, None, None]
    keep = scored & (~finite | (L >= threshold))
    if rule.min_blocks:
        k = min(rule.min_blocks, L.shape[-1])
        keep |= finite & (L >= comparable.topk(k, dim=-1).values[..., -1:])

    cut, device = grid.variant.cut, L.device
    keep = keep | (always_kept_of_own(grid, rule, device) if cut else always_kept(grid.geometry, rule, device))
    return keep.repeat_interleave(group, 1) if rule.kv_masks else keep


def always_kept(geometry: Geometry, rule: Rule, device: torch.device | str) -> Tensor:
    """The sinks, the window and the last query blocks. They are kept whatever the scores are: bool [M, N]."""
    causal = causal_blocks(geometry, device)
    I = torch.arange(causal.shape[0], device=device)[:, None]
    J = torch.arange(causal.shape[1], device=device)
    last_visible = causal.sum(-1, keepdim=True) - 1
    last_rows = I >= causal.shape[0] - rule.last_full_blocks
    return causal & ((J < rule.sink_blocks) | (J > last_visible - rule.window_blocks) | last_rows)


def always_kept_of_own(grid: Grid, rule: Rule, device: torch.device | str) -> Tensor:
    """As `always_kept` where keys are cut: each row keeps that of its own sequence, as far as it sees the block.

    Returns:
        bool [1 or B, 1, M, N].
    """
    b, pieces = grid.block_size, []
    for I, J in grid.pieces():
        view = grid.view(device, I, J)
        block = view.block_start // b
        sink = block < view.start // b + rule.sink_blocks
        # the last row of the sequence in the query block
        last_row = torch.minimum(view.position[:, :, -1:], view.end - 1)
        window = block > last_row // b - rule.window_blocks
        query_block = torch.arange(I.start, I.stop, device=device).view(1, -1, 1, 1)
        last_rows = query_block > (view.end - 1 - grid.offset) // b - rule.last_full_blocks
        pieces.append((I, J, (view.sees & (sink | window | last_rows)).any(2)))
    return grid.joined(pieces, device)[:, None]
