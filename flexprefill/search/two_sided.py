"""The two-sided search in plain PyTorch: float32, any device, written to be read.

A mean of 128 keys hides what one key holds. So the search can look from both sides. A few rows of each query block
attend exactly to all keys: the probes. A few keys of each key block are scored by all rows: the outliers.

B is the batch size. Hq and Hkv are the numbers of query and key heads, and g = Hq / Hkv. b is the block size. M and N
are the numbers of query and key blocks, I and J their indices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap.bits import pack_bits, unpack_bits
from flexprefill.blockmap.geometry import Geometry, causal_blocks, ceil_div
from flexprefill.runtime.memory import PIECE
from flexprefill.search.reference import always_kept
from flexprefill.search.rule import Rule
from flexprefill.variant.logits import float_products

FULL_SIGHT = 64  # visible blocks up to which a query block has all its probes
SIGHT_STEP = 2  # a row of blocks that is so many times longer has half as many
NEIGHBOUR_SHARE = 0.4  # a head takes what another head of its group holds so much stronger: 1 / 0.4 times the share
NEIGHBOURS = 16  # query heads of a key head that look at each other's shares, at most
OUTLIER_GROUP = 64  # key blocks whose outliers are looked at together


def farthest(tensor: Tensor, block_size: int, count: int) -> Tensor:
    """The vectors of each block that lie farthest from the block's mean, by distance in float32.

    Args:
        tensor: [B, H, S, D].
        block_size: Vectors of a block. The last block may be short.
        count: How many. A block of fewer vectors names them again.

    Returns:
        Indices in the block, int32 [B, H, blocks, count], the farthest first.
    """
    length = tensor.shape[2]
    blocks = ceil_div(length, block_size)
    padded = pad(tensor.float(), (0, 0, 0, blocks * block_size - length)).unflatten(2, (blocks, block_size))
    sizes = (length - torch.arange(blocks, device=tensor.device) * block_size).clamp(max=block_size)
    mean = padded.sum(3, keepdim=True) / sizes[:, None, None]
    inside = torch.arange(block_size, device=tensor.device) < sizes[:, None]
    distance = torch.where(inside, (padded - mean).square().sum(-1), -1.0)
    order = distance.sort(dim=-1, descending=True, stable=True).indices
    which = torch.arange(count, device=tensor.device) % sizes[:, None]
    return order.gather(3, which.expand(*order.shape[:2], -1, -1)).int()


def outlier_keys(key: Tensor, block_size: int, count: int) -> Tensor:
    """The keys of each block that lie farthest from its mean: [B, Hkv, S_kv, D] to [B, Hkv, N, count, D]."""
    index = farthest(key, block_size, count).long()
    place = index + (torch.arange(index.shape[2], device=key.device) * block_size)[:, None]
    return key.gather(2, place.flatten(2)[..., None].expand(-1, -1, -1, key.shape[3])).unflatten(2, index.shape[2:])


def probes_of(visible: int, probe_rows: int) -> int:
    """How many rows of a query block are probed that sees so many key blocks.

    All up to FULL_SIGHT blocks, half as many up to SIGHT_STEP times as many blocks, and so on, but one.
    """
    reach = FULL_SIGHT
    while visible > reach and probe_rows > 1:
        reach, probe_rows = reach * SIGHT_STEP, probe_rows // 2
    return probe_rows


def probe_rows_of(query: Tensor, geometry: Geometry, group: int, probe_rows: int) -> tuple[Tensor, Tensor]:
    """The probed rows of each query block.

    Half of them, rounded up, are spread evenly. The heads of a group take turns, so together they see more of a block.
    The other half are the rows farthest from the block's mean query.

    Args:
        query: [B, Hq, S_q, D].
        geometry: The sizes.
        group: g.
        probe_rows: How many rows of a query block are probed at most.

    Returns:
        Rows, int64 [B, Hq, M, probe_rows], and how many of them count, int64 [M]. The first half of those that count
        are the even ones.
    """
    rows, b, device = geometry.rows, geometry.block_size, query.device
    counts = []
    far = farthest(query, b, max(probe_rows // 2, 1)).long()
    found = torch.zeros(*query.shape[:2], rows, probe_rows, dtype=torch.int64, device=device)
    member = torch.arange(query.shape[1], device=device)[:, None] % group
    for block in range(rows):
        size = min(b, geometry.q_len - block * b)
        last = geometry.offset + block * b + size - 1
        count = probes_of(last // b + 1, probe_rows)
        even = ceil_div(count, 2)
        i = torch.arange(even, device=device)
        found[:, :, block, :even] = block * b + (2 * (i * group + member) + 1) * size // (2 * group * even)
        found[:, :, block, even:count] = block * b + far[:, :, block, : count - even]
        counts.append(count)
    return found, torch.tensor(counts, device=device)


def probe_shares(query: Tensor, key: Tensor, scale: float, rows: Tensor, block_size: int) -> Tensor:
    """The share of each probed row's exact attention that each key block holds.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        scale: Factor on the dot products.
        rows: int64 [B, Hq, M, n].
        block_size: b.

    Returns:
        float32 [B, Hq, M, n, N].
    """
    (batch, heads), kv_len, group = query.shape[:2], key.shape[2], query.shape[1] // key.shape[1]
    columns = ceil_div(kv_len, block_size)
    offset = kv_len - query.shape[2]
    shares = torch.empty(*rows.shape, columns, device=query.device)
    position = torch.arange(kv_len, device=query.device)
    step = max(1, PIECE // (kv_len * rows.shape[3]))
    for b in range(batch):
        for h in range(heads):
            keys = key[b, h // group].float()
            for first in range(0, rows.shape[2], step):
                own = rows[b, h, first : first + step]
                logits = scale * float_products(query[b, h][own], keys.T)
                hidden = position > own[..., None] + offset
                weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
                padded = pad(weights, (0, columns * block_size - kv_len))
                shares[b, h, first : first + step] = padded.unflatten(-1, (columns, block_size)).sum(-1)
    return shares


def blocks_of_probes(shares: Tensor, counts: Tensor, group: int, probe_share: float) -> Tensor:
    """The blocks that the probes want.

    A block's share is the mean over the query block's probes. A head takes the block if its own share reaches
    ``probe_share``, or if NEIGHBOUR_SHARE times the best share in its group does. A share that is not a number takes
    it.

    Args:
        shares: As `probe_shares` gives them, [B, Hq, M, n, N].
        counts: How many of the n rows count, [M].
        group: g.
        probe_share: The least share.

    Returns:
        bool [B, Hq, M, N].
    """
    counted = torch.arange(shares.shape[3], device=shares.device) < counts[:, None]
    mean = torch.where(counted[..., None], shares, 0).sum(3) / counts[:, None]
    keep = ~(mean < probe_share)
    for first in range(0, shares.shape[1], group):
        for start in range(first, first + group, NEIGHBOURS):
            own = slice(start, min(start + NEIGHBOURS, first + group))
            keep[:, own] |= mean[:, own].amax(1, keepdim=True) * NEIGHBOUR_SHARE >= probe_share
    return keep


def blocks_of_outliers(
    query: Tensor, key: Tensor, scale: float, outliers: Tensor, geometry: Geometry, outlier_share: float
) -> Tensor:
    """The blocks with an outlier key that some row looks at.

    A row's share of one key is estimated. Its denominator has the row's own key block, exact and up to the row, and the
    strongest outlier of the earlier blocks, up to the end of the key's group of OUTLIER_GROUP blocks. A block is taken
    if the share of one of its outliers reaches ``outlier_share`` for one row that stands behind the block.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        scale: Factor on the dot products.
        outliers: As `outlier_keys` gives them, [B, Hkv, N, r, D].
        geometry: The sizes.
        outlier_share: The least share.

    Returns:
        bool [B, Hq, M, N].
    """
    (batch, heads), group = query.shape[:2], query.shape[1] // key.shape[1]
    rows, columns, b, device = geometry.rows, geometry.columns, geometry.block_size, query.device
    r = outliers.shape[3]
    of_block = torch.arange(columns, device=device).repeat_interleave(r)
    last_of_group = torch.arange(0, columns, OUTLIER_GROUP, device=device) + OUTLIER_GROUP - 1
    keep = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    for e in range(batch):
        for h in range(heads):
            for block in range(rows):
                own = slice(block * b, min((block + 1) * b, geometry.q_len))
                position = torch.arange(own.start, own.stop, device=device)[:, None] + geometry.offset
                near = slice((geometry.offset + own.start) // b * b, geometry.offset + own.stop)
                at = torch.arange(near.start, near.stop, device=device)
                queries, keys = query[e, h, own], key[e, h // group]
                logits = scale * float_products(queries, keys[near].T)
                hidden = (at > position) | (at // b != position // b)
                exact = logits.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
                far = scale * float_products(queries, outliers[e, h // group].flatten(0, 1).T)
                far = far.masked_fill(of_block >= position // b, -torch.inf)
                missing = last_of_group.numel() * OUTLIER_GROUP * r - far.shape[1]
                by_group = pad(far, (0, missing), value=-torch.inf).unflatten(1, (-1, OUTLIER_GROUP * r)).amax(-1)
                total = torch.logaddexp(by_group.cummax(1).values, exact)
                share = far - total.repeat_interleave(OUTLIER_GROUP * r, 1)[:, : far.shape[1]]
                peak = share.unflatten(1, (columns, r)).amax((0, 2))
                keep[e, h, block] = ~(peak < math.log(outlier_share)) & (of_block[::r] < position[-1] // b)
    return keep


def keep_more(
    query: Tensor, key: Tensor, outliers: Tensor | None, words: Tensor | None, rule: Rule, measured: bool
) -> tuple[Tensor, Tensor | None]:
    """The words of a search with what probes and outliers keep, and how much attention the probes see in them.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        outliers: [B, Hkv, N, outlier_keys, D], or None without them.
        words: int32 [B, Hq, M, ceil(N / 32)] of the means' side, or None without it.
        rule: The settings of the call.
        measured: Whether the attention is wanted.

    Returns:
        int32 [B, Hq, M, ceil(N / 32)], and float32 [B, Hq, M] or None.
    """
    geometry, group = Geometry(query.shape[2], key.shape[2], rule.block_size), query.shape[1] // key.shape[1]
    keep = always_kept(geometry, rule, query.device).expand(*query.shape[:2], -1, -1)
    if words is not None:
        keep = keep | unpack_bits(words, geometry.columns)
    if outliers is not None:
        keep = keep | blocks_of_outliers(query, key, rule.scale, outliers, geometry, rule.outlier_share)
    if not rule.probe_rows:
        return pack_bits(keep), None
    rows, counts = probe_rows_of(query, geometry, group, rule.probe_rows)
    shares = probe_shares(query, key, rule.scale, rows, rule.block_size)
    keep = keep | blocks_of_probes(shares, counts, group, rule.probe_share)
    keep = keep & causal_blocks(geometry, query.device)
    if not measured:
        return pack_bits(keep), None
    even = torch.arange(rule.probe_rows, device=query.device) < ((counts + 1) // 2)[:, None]
    held = torch.where(even, (shares * keep[:, :, :, None]).sum(-1), 0)
    return pack_bits(keep), held.sum(-1) / even.sum(-1)
