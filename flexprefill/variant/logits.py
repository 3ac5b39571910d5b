"""The one attention in plain PyTorch. It runs on any device, is slow, and computes whatever has no kernel.

It computes in float32, or in float64 for tensors of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill.blockmap.masking import MaskMod
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.thread_state import without_autocast
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.mods import ScoreMod
from flexprefill.variant.variant import AttentionVariant

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class PlainAttention:
    """One call's attention. The caller takes logits from it in pieces of its choice.

    Attributes:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        scale: Factor on the dot products.
        variant: Applied first. Its sinks are no part of the logits.
        mask_mods: FlexAttention's, called with indices that broadcast.
        score_mods: FlexAttention's, called with indices that broadcast.
        causal: Queries are the last S_q of the S_kv positions and see the keys up to their own. If False, the variant
            must be plain.
    """

    query: Tensor
    key: Tensor
    scale: float
    variant: AttentionVariant
    mask_mods: tuple[MaskMod, ...] = ()
    score_mods: tuple[ScoreMod, ...] = ()
    causal: bool = True

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def logits(self, batch: slice, heads: slice, rows: Tensor | slice, keys: Tensor | slice) -> Tensor:
        """Natural logits of some rows against some keys: [batch, heads, R, K], -inf where a key is hidden.

        Args:
            batch: Batch entries.
            heads: Query heads, of one key head or all of several.
            rows: Indices int64 [R], or a slice with a start and a stop.
            keys: Indices int64 [K], or a slice with a start and a stop.
        """
        own_keys = self.key[batch, self._kv_heads(heads)][:, :, keys]
        queries = self.query[batch, heads][:, :, rows].unflatten(1, (own_keys.shape[1], -1))
        logits = self.scale * float_products(queries, own_keys[:, :, None].transpose(3, 4)).flatten(1, 2)
        return self._modified(logits, batch, heads, _indices(rows, logits), _indices(keys, logits))

    def _kv_heads(self, heads: slice) -> slice:
        """The key heads of query heads."""
        return slice(heads.start // self.group, (heads.stop - 1) // self.group + 1)

    def _modified(self, logits: Tensor, batch: slice, heads: slice, rows: Tensor, keys: Tensor) -> Tensor:
        device, variant = logits.device, self.variant
        b = torch.arange(batch.start, batch.stop, device=device)[:, None, None, None]
        h = torch.arange(heads.start, heads.stop, device=device)[:, None, None]
        position = rows[:, None] + (self.key.shape[2] - self.query.shape[2])
        distance = position - keys
        logits = soft_capped(logits, variant.soft_cap)
        if variant.alibi_slopes is not None:
            logits = logits - variant.alibi_slopes[heads].float()[:, None, None] * distance
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if variant.sliding_window is not None:
            hidden = hidden | (distance >= variant.sliding_window)
        if variant.sequences is not None:
            starts = variant.sequences.starts
            own = starts[batch if starts.shape[0] > 1 else slice(0, 1)]
            hidden = hidden | (keys < own[:, position[:, 0]][:, None, :, None])
        for score_mod in self.score_mods:
            logits = score_mod(logits, b, h, rows[:, None], keys)
        for mask_mod in self.mask_mods:
            hidden = hidden | ~mask_mod(b, h, rows[:, None], keys)
        return logits.masked_fill(hidden, -torch.inf)

    def attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, Hq, S_q, Dv] over values [B, Hkv, S_kv, Dv], and natural log-sum-exps [B, Hq, S_q].

        A row that sees nothing outputs zeros, and its log-sum-exp is -inf. The variant's sinks change only the output.
        """
        sizes, dtype = self.query.shape[:3], computed_in(self.query)
        output = self.query.new_empty(*sizes, value.shape[3], dtype=dtype)
        sums = self.query.new_empty(sizes, dtype=dtype)
        for batch, heads, rows in self._pieces():
            keys = self._keys_before(rows)
            logits = self.logits(batch, heads, rows, keys)
            lse = logits.logsumexp(-1)
            weights = (logits - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
            own_values = value[batch, self._kv_heads(heads)][:, :, None, keys]
            grouped = weights.unflatten(1, (own_values.shape[1], -1))
            output[batch, heads, rows] = float_products(grouped, own_values).flatten(1, 2)
            sums[batch, heads, rows] = lse
        return output if self.variant.sinks is None else add_sinks(output, sums, self.variant.sinks), sums

    def _keys_before(self, rows: slice) -> slice:
        """The keys that some rows can see by order and window. In a graph, which fits every length, all keys."""
        offset, window = self.key.shape[2] - self.query.shape[2], self.variant.sliding_window
        if is_tracing() or not self.causal:
            return slice(0, self.key.shape[2])
        return slice(0 if window is None else max(0, rows.start + offset - window + 1), rows.stop + offset)

    def _pieces(self) -> Iterator[tuple[slice, slice, slice]]:
        """Batch entries, heads and rows: all at once if that is not too much, else some rows of one key head."""
        batch, heads, q_len, _ = self.query.shape
        # if the number of pieces depended on lengths, each number would compile anew
        if is_tracing() or batch * heads * q_len * self.key.shape[2] <= PIECE:
            yield slice(0, batch), slice(0, heads), slice(0, q_len)
            return
        rows_a_piece = max(1, PIECE // (self.group * self.key.shape[2]))
        for b in range(batch):
            for first_head in range(0, heads, self.group):
                for first in range(0, q_len, rows_a_piece):
                    rows = slice(first, min(first + rows_a_piece, q_len))
                    yield slice(b, b + 1), slice(first_head, first_head + self.group), rows


def float_products(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products in float32, or float64 where left is, under autocast too."""
    dtype = computed_in(left)
    with without_autocast():
        return left.to(dtype) @ right.to(dtype)


def computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which plain PyTorch computes with a tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _indices(chosen: Tensor | slice, like: Tensor) -> Tensor:
    return torch.arange(chosen.start, chosen.stop, device=like.device) if isinstance(chosen, slice) else chosen


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Adds one more logit of each head, without a value, to the softmax of attention over keys.

    Args:
        output: [B, Hq, S_q, Dv].
        lse: Natural log-sum-exps, [B, Hq, S_q].
        sinks: [Hq].
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (output * share[..., None]).to(output.dtype)


def soft_capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """soft_cap · tanh(logits / soft_cap)."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def log2_sum(logs: Tensor, dim: int) -> Tensor:
    """log2 of the sum of 2^logs along a dimension. NaN where one of them is."""
    m = logs.amax(dim, keepdim=True)
    shift = torch.where(m.isinf(), 0, m)  # -inf - -inf would be NaN
    return shift.squeeze(dim) + torch.log2(torch.exp2(logs - shift).sum(dim))
