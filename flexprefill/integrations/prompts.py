"""Where the prompts of a batch lie among padding and empty cache slots, and attention of each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill.blockmap import BlockMap
from flexprefill.errors import FlexPrefillError
from flexprefill.flex import lists_of
from flexprefill.recording import is_recording

BLOCK_SIZE = 128  # of a mask that carries prompts; what a layer keeps has its config's


class Span(NamedTuple):
    """The key slots first … end - 1 that hold a prompt."""

    first: int
    end: int


class Prompts:
    """The prompts of a batch, as the mask_mod that shows each query its own prompt's keys up to itself.

    A mask_mod is what a BlockMask carries through the code of a model, so here it carries the numbers, too.

    Args:
        batch: how many prompts.
        offset: the slot of the first query.
        window: how many keys a query sees at most, its own among them; None is all of them.
        spans: the slots of each prompt; None if each fills all slots up to the last query.
        device: of the mask.
    """

    def __init__(
        self,
        batch: int,
        offset: int,
        window: int | None,
        spans: tuple[Span, ...] | None,
        device: torch.device | str,
    ) -> None:
        self.batch, self.offset, self.window, self.spans, self.device = batch, offset, window, spans, device
        if spans is not None:
            self._first, self._end = torch.tensor(spans, dtype=torch.int32, device=device).T.contiguous()

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        behind = q_idx + self.offset - kv_idx
        seen = behind >= 0
        if self.window is not None:
            seen = seen & (behind < self.window)
        if self.spans is not None:
            seen = seen & (kv_idx >= self._first[b]) & (kv_idx < self._end[b])
        return seen

    def to_block_mask(self, q_len: int) -> BlockMask:
        """The BlockMask of ``q_len`` queries over the slots up to the last: [B, 1, q_len, offset + q_len].

        Every block that is causally visible is listed as partial.
        """
        lengths = q_len, self.offset + q_len
        causal = BlockMap.causal(
            self.batch, 1, q_len=q_len, kv_len=lengths[1], block_size=BLOCK_SIZE, device=self.device
        )
        return BlockMask.from_kv_blocks(
            *lists_of(causal, self, None),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=self,
            seq_lengths=lengths,
            compute_q_blocks=False,
        )


def spans_of(real: Tensor) -> tuple[Span, ...]:
    """The spans of a padding mask, bool [B, slots], True where a slot holds a token; waits for the device.

    Raises:
        ValueError: padding stands between tokens.
    """
    slot = torch.arange(real.shape[1], device=real.device)
    end = torch.where(real, slot + 1, 0).amax(1)
    count = real.sum(1)
    first = torch.where(real, slot, end[:, None]).amin(1)
    holes = (count != end - first).any().expand(1)
    *flat, broken = torch.cat([first, end, holes.to(first.dtype)]).tolist()  # one transfer
    if broken:
        raise ValueError(
            "attention_mask must have padding before or behind a prompt only, got padding between tokens: "
            "pad on the left to continue padded prompts by more than one token"
        )
    batch = real.shape[0]
    return tuple(Span(*span) for span in zip(flat[:batch], flat[batch:], strict=True))


def attend_each(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, prompts: Prompts
) -> Tensor:
    """Attention of each prompt without its padding; prompts of one span go together.

    Args:
        attend: query [b, Hq, s_q, D], key [b, Hkv, s_kv, D], value → [b, Hq, s_q, Dv], the queries being the last.
        query: [B, Hq, S_q, D]; key, value: [B, Hkv, slots, D].

    Returns:
        [B, Hq, S_q, Dv], zeros where a query is padding.

    Raises:
        FlexPrefillError: masks are recorded, and the prompts differ in their places.
    """
    spans = prompts.spans
    if spans is None:
        used = slice(prompts.offset + query.shape[2])
        return attend(query, key[:, :, used], value[:, :, used])
    if is_recording() and len(set(spans)) > 1:
        raise FlexPrefillError(
            "record_masks cannot record a batch of prompts with different padding, whose maps differ in size: "
            "record them one by one"
        )
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for span in sorted(set(spans)):
        rows = slice(max(span.first - prompts.offset, 0), span.end - prompts.offset)
        if rows.stop <= rows.start:
            continue
        entries = [entry for entry, its in enumerate(spans) if its == span]
        used = slice(*span)
        output[entries, :, rows] = attend(query[entries, :, rows], key[entries, :, used], value[entries, :, used])
    return output
