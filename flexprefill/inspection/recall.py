"""What a map does to attention: the exact mass that its blocks hold, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.map import BlockMap, check_block_map
from flexprefill.inspection.rows import (
    SAMPLED_ROWS,
    Rows,
    check_rows,
    check_seed,
    exact_weights,
    first_seen,
    rows_that_can_lose,
    sample_rows,
)
from flexprefill.inspection.text import head_column, head_label, table_lines
from flexprefill.runtime.progress import Advance, asked_stage
from flexprefill.variant.inputs import check_attention_inputs, resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import AttentionVariant, check_variant

SHOWN_HEADS = 10  # in the text of a Recall
NO_ROW = -1


@dataclass(frozen=True, eq=False, repr=False)
class Recall:
    """The share of the exact attention mass that a map's kept blocks hold, of the measured rows of each head.

    ``print(recall)`` lists the heads that lose most, and where. All tensors are on the CPU.

    Attributes:
        shares: float32 [B, Hq, R], in 0 … 1: of each measured row. NaN where a head has fewer than R of them.
        rows: int64 [B, Hq, R]: which queries these are, 0 … q_len - 1; -1 where a head has fewer.
        can_lose: int64 [B, Hq]: how many queries of the head see a key in a block that it drops. A head with none of
            these has nothing to lose, and 1.0 in every figure.
    """

    shares: Tensor
    rows: Tensor
    can_lose: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over the measured rows: float32 [B, Hq]."""
        measured = (self.rows != NO_ROW).sum(-1)
        total = self.shares.double().masked_fill(self.rows == NO_ROW, 0).sum(-1)
        return torch.where(measured > 0, total / measured.clamp(min=1), 1.0).float()

    @property
    def overall(self) -> float:
        """The mean of :attr:`mean` over the heads that can lose something; 1.0 if there are none."""
        losing = self.mean[self.can_lose > 0]
        return losing.double().mean().item() if losing.numel() else 1.0

    @property
    def least(self) -> Tensor:
        """The least share of a measured row: float32 [B, Hq]."""
        return self.least_rows()[0][..., 0]

    @property
    def least_row(self) -> Tensor:
        """The query that :attr:`least` is of: int64 [B, Hq], -1 for a head without a measured row."""
        return self.least_rows()[1][..., 0]

    def least_rows(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """The rows of each head that lose most, the worst first.

        Returns:
            shares float32 [B, Hq, count] and queries int64 [B, Hq, count]: 1.0 and -1 where a head has fewer rows.

        Raises:
            TypeError, ValueError: ``count`` is no int of at least 1.
        """
        if type(count) is not int:
            raise TypeError(f"count must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        missing = max(0, count - self.rows.shape[-1])
        rows = pad(self.rows, (0, missing), value=NO_ROW)
        shares = pad(self.shares, (0, missing)).masked_fill(rows == NO_ROW, 1)
        # behind the numbers NaN of a broken row, which makes the mean NaN, and behind these what is no row
        order = shares.nan_to_num(2).masked_fill(rows == NO_ROW, 3).argsort(dim=-1, stable=True)[..., :count]
        return shares.gather(-1, order), rows.gather(-1, order)

    def quantile(self, q: float) -> Tensor:
        """The share below which a fraction ``q`` of a head's measured rows lies: float32 [B, Hq].

        Raises:
            TypeError, ValueError: ``q`` is no number in 0 … 1.
        """
        if isinstance(q, bool) or not isinstance(q, (int, float)):
            raise TypeError(f"q must be a number, got {q!r}")
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in 0 … 1, got {q}")
        found = torch.ones(self.can_lose.shape, dtype=torch.float32, device="cpu")
        for place in product(*map(range, found.shape)):
            shares = self.shares[place][self.rows[place] != NO_ROW]
            if shares.numel():
                found[place] = float(np.quantile(shares.numpy(), q))
        return found

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dict for each head, as ``pandas.DataFrame`` takes them, in the heads' order.

        Each has batch, head, recall (the mean), recall_p05, recall_median, recall_least, least_row (None if no row was
        measured), measured_rows and rows_that_can_lose.
        """
        figures = zip(*(t.flatten().tolist() for t in self._figures()), strict=True)
        names = ("recall", "recall_p05", "recall_median", "recall_least", "least_row", "measured_rows")
        heads = product(*map(range, self.can_lose.shape))
        return [
            {"batch": batch, "head": head, **dict(zip(names, found, strict=False)), "rows_that_can_lose": found[-1]}
            | ({"least_row": None} if found[4] == NO_ROW else {})
            for (batch, head), found in zip(heads, figures, strict=True)
        ]

    def _figures(self) -> tuple[Tensor, ...]:
        least, least_row = self.least_rows()
        measured = (self.rows != NO_ROW).sum(-1)
        return self.mean, self.quantile(0.05), self.quantile(0.5), least, least_row, measured, self.can_lose

    def __repr__(self) -> str:
        batch, heads, rows = self.shares.shape
        return (
            f"Recall(overall={self.overall:.3f}, least_head={self.mean.min():.3f}, B={batch}, H={heads}, rows={rows})"
        )

    def __str__(self) -> str:
        """The heads that lose most, the worst first, a line each."""
        batches = self.rows.shape[0]
        heads = sorted(self.to_dicts(), key=lambda head: np.nan_to_num(head["recall"], nan=-1))
        losing = [head for head in heads if head["rows_that_can_lose"]]
        lines = [f"recall of the attention mass: {self.overall:.3f}, the mean of the heads that can lose some"]
        header = [head_column(batches), "mean", "5 %", "median", "least", "at query", "measured/that can lose"]
        figures = ("recall", "recall_p05", "recall_median", "recall_least")
        rows = [
            [
                head_label(head["batch"], head["head"], batches),
                *(f"{head[name]:.3f}" for name in figures),
                str(head["least_row"]),
                f"{head['measured_rows']:,}/{head['rows_that_can_lose']:,} rows",
            ]
            for head in losing[:SHOWN_HEADS]
        ]
        lines += table_lines(header, rows) if rows else []
        if len(losing) > SHOWN_HEADS:
            lines.append(f"… and {len(losing) - SHOWN_HEADS} heads that lose less")
        if len(losing) < len(heads):
            lines.append(f"{len(heads) - len(losing)} of {len(heads)} heads drop nothing that a query sees")
        return "\n".join(lines)


def attention_recall(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    *,
    variant: AttentionVariant | None = None,
    scale: float | None = None,
    rows: Rows = SAMPLED_ROWS,
    seed: int = 0,
    progress: bool | Advance | None = None,
) -> Recall:
    """The share of the exact attention mass that the kept blocks hold, row by row, for each head.

    A row (a query) can lose mass only if it sees a key in a dropped block. By default only such rows are measured: the
    others hold 1.0 whatever the setting is, and would raise the mean. The rows are spread over the prompt, one drawn
    from each of equally many of them, and are the same at each call with the same seed.

    The attention of these rows is computed in float32, also under autocast, some rows of one head at a time. At 131,072
    tokens and D = 128 the default took 2.0 s a head on one core of a CPU, and 0.4 GiB.

    Args:
        query: [B, Hq, S_q, D], the last S_q of the S_kv positions; float16, bfloat16 or float32.
        key: [B, Hkv, S_kv, D], of query's dtype and device.
        block_map: [B, Hq, M, N] of these lengths.
        variant: what the attention is besides causal, as in :func:`search_blocks`; its sinks take no part.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        rows: how many rows of each head to measure, all of them if there are fewer. None measures every row that can
            lose mass. A list, such as ``range(0, q_len, 1000)``, measures exactly these queries in every head, also
            those that can lose nothing.
        seed: of the drawing of rows.
        progress: True shows a bar on stderr (with tqdm, else a line); a function is called with 1 after each head,
            B · Hq times.

    Returns:
        A :class:`Recall`, on the CPU: its ``mean``, ``least`` and ``quantile(0.05)`` are float32 [B, Hq].

    Raises:
        TypeError, ValueError: the tensors or the map do not fit together, or ``rows`` or ``seed`` are none.
    """
    check_attention_inputs(query, key)
    check_block_map(block_map, query, key)
    variant = check_variant(variant, query, key)
    attention = PlainAttention(query, key, resolve_scale(scale, query.shape[3]), variant)
    return recall_of(attention, block_map, rows=rows, seed=seed, progress=progress)


@torch.no_grad()
def recall_of(
    attention: PlainAttention,
    block_map: BlockMap,
    *,
    rows: Rows = SAMPLED_ROWS,
    seed: int = 0,
    progress: bool | Advance | None = None,
) -> Recall:
    """As :func:`attention_recall`, of an attention that fits the map."""
    asked, seed = check_rows(rows, block_map.q_len), check_seed(seed)
    batch, heads = block_map.shape[:2]
    measured, shares, can_lose = [], [], []
    with asked_stage(progress, "attention mass", batch * heads) as advance:
        for b in range(batch):
            first = first_seen(attention, block_map.geometry, b)
            for head in range(heads):
                losing = rows_that_can_lose(block_map, b, head, first)
                own = asked if isinstance(asked, Tensor) else sample_rows(losing, asked, seed)
                can_lose.append(losing.numel())
                measured.append(own)
                shares.append(_kept_shares(attention, block_map, b, head, own))
                advance(1)
    return Recall(
        _by_head(shares, (batch, heads), torch.nan),
        _by_head(measured, (batch, heads), NO_ROW),
        torch.tensor(can_lose, device="cpu").view(batch, heads),
    )


def join_recalls(first: Recall, second: Recall, queries: int) -> Recall:
    """Of two chunks of a prompt that follow each other, the first ending with so many queries: the recall of both.

    Of the chunk that was sampled more closely rows are left out, evenly, so that the mean weighs all rows alike.
    """
    shape = (first.rows.shape[0], first.rows.shape[1])
    rows, shares = [], []
    for place in product(*map(range, shape)):
        chunks = []
        for recall, shift in ((first, 0), (second, queries)):
            measured = recall.rows[place] != NO_ROW
            total = int(recall.can_lose[place])
            chunks.append((recall.rows[place][measured] + shift, recall.shares[place][measured], total))
        sampled = min((own.numel() / total for own, _, total in chunks if total), default=1.0)
        # up or down by chance: rounded to the nearest, many short chunks would count too much or not at all
        chance = torch.rand((), generator=torch.Generator().manual_seed(queries), device="cpu").item()
        wanted = (sampled * total for _, _, total in chunks)
        picks = [
            _evenly(own.numel(), min(own.numel(), math.floor(share + chance) if share % 1 > 1e-9 else round(share)))
            for (own, _, _), share in zip(chunks, wanted, strict=True)
        ]
        rows.append(torch.cat([own[pick] for (own, _, _), pick in zip(chunks, picks, strict=True)]))
        shares.append(torch.cat([own[pick] for (_, own, _), pick in zip(chunks, picks, strict=True)]))
    return Recall(_by_head(shares, shape, torch.nan), _by_head(rows, shape, NO_ROW), first.can_lose + second.can_lose)


def _evenly(count: int, kept: int) -> Tensor:
    """So many of 0 … count - 1, at equal steps: int64 [kept]."""
    return (2 * torch.arange(kept, device="cpu") + 1) * count // max(1, 2 * kept)


def _kept_shares(attention: PlainAttention, block_map: BlockMap, batch: int, head: int, rows: Tensor) -> Tensor:
    """Of each row: float32 [R] on the CPU."""
    size = block_map.block_size
    shares = torch.empty(rows.numel(), dtype=torch.float32, device="cpu")
    for place, own, weights in exact_weights(attention, batch, head, rows):
        by_block = pad(weights, (0, -weights.shape[1] % size)).unflatten(1, (-1, size)).sum(-1)
        dropped = ~unpack_bits(block_map.words[batch, head, own // size], block_map.shape[3])
        # what is lost, since a row that loses nothing then holds 1.0 without a rounding error
        shares[place] = (1 - (by_block * dropped[:, : by_block.shape[1]]).sum(-1)).clamp(min=0).float().cpu()
    return shares


def _by_head(tensors: Sequence[Tensor], shape: tuple[int, int], missing: float) -> Tensor:
    """Tensors [R_i], one a head, as [*shape, R]."""
    return pad_sequence(list(tensors), batch_first=True, padding_value=missing).unflatten(0, shape)
