"""Where the prompts of a batch lie among padding and empty cache slots, and attention of each prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill.blockmap.block_mask import Cut, list_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.errors import UnsupportedError
from flexprefill.runtime.listeners import is_recording
from flexprefill.variant.sequences import Sequences

BLOCK_SIZE = 128  # of a mask that carries prompts; a layer's map has its config's block size


class Span(NamedTuple):
    """The key slots first … end - 1 that hold a prompt."""

    first: int
    end: int


class Prompts:
    """The prompts of a batch. As a mask_mod it shows each query its own prompt's keys, up to itself.

    Args:
        batch: How many prompts.
        offset: The slot of the first query.
        window: How many slots a query sees at most, its own included. None: all.
        spans: The slots of each prompt. Inside torch.compile only the device knows them: int32 [B, 2], the first slot
            and the end. None: each prompt fills all slots up to the last query.
        device: The mask's device.
        real: Bool [B, slots], True where a slot holds a token, if a prompt's span has padding among its tokens. Else
            None.
        sequences: The sequences of the slots, if prompts are packed in a row. The prompts then fill all slots.
    """

    def __init__(
        self,
        batch: int,
        offset: int,
        window: int | None,
        spans: tuple[Span, ...] | Tensor | None,
        device: torch.device | str,
        real: Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> None:
        self.batch, self.offset, self.window, self.spans, self.device = batch, offset, window, spans, device
        self.real, self.sequences = real, sequences
        self._packed: tuple[Tensor, Sequences | None] | None = None
        if spans is not None:
            on_device = spans if isinstance(spans, Tensor) else torch.tensor(spans, dtype=torch.int32, device=device)
            self._first, self._end = on_device.T.contiguous()

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        behind = q_idx + self.offset - kv_idx
        seen = behind >= 0
        if self.window is not None:
            seen = seen & (behind < self.window)
        if self.spans is not None:
            seen = seen & (kv_idx >= self._first[b]) & (kv_idx < self._end[b])
        if self.real is not None:
            seen = seen & self.real[b, kv_idx]
        if self.sequences is not None:
            starts = self.sequences.starts
            seen = seen & (kv_idx >= starts[b if starts.shape[0] > 1 else torch.zeros_like(b), q_idx + self.offset])
        return seen

    def packed_as(self, sequences: Sequences) -> Prompts:
        """The same prompts, packed in a row.

        Raises:
            UnsupportedError: They are packed already, in another way.
        """
        ours = self.sequences
        if ours is not None and not bool((ours.starts == sequences.starts).all() & (ours.ends == sequences.ends).all()):
            raise UnsupportedError("cu_seq_lens_q must say the sequences that position_ids say, got others")
        return Prompts(self.batch, self.offset, self.window, self.spans, self.device, sequences=sequences)

    def packed_by(self, positions: Tensor, kv_len: int) -> Prompts:
        """The same prompts, packed where positions start anew at 0. Waits for the device, once for all layers.

        Args:
            positions: [1, kv_len], of a single row. Those of several rows are not read.
        """
        if self.batch != 1 or positions.shape != (1, kv_len):
            return self
        if positions.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can wait
            return self
        if self._packed is None or self._packed[0] is not positions:
            self._packed = positions, sequences_of(positions)
        sequences = self._packed[1]
        return self if sequences is None else self.packed_as(sequences)

    def to_block_mask(self, q_len: int) -> BlockMask:
        """The BlockMask of ``q_len`` queries over the slots up to the last: [B, 1, q_len, offset + q_len].

        Every causally visible block is listed as partial.
        """
        lengths = q_len, self.offset + q_len
        causal = BlockMap.causal(
            self.batch, 1, q_len=q_len, kv_len=lengths[1], block_size=BLOCK_SIZE, device=self.device
        )
        lists = list_blocks(causal.words, causal.geometry, Cut((self,))).lists
        return BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK_SIZE, mask_mod=self, seq_lengths=lengths, compute_q_blocks=False
        )


def sequences_of(positions: Tensor) -> Sequences | None:
    """The sequences of a row of positions, [1, S], if each sequence starts at 0; else None."""
    starts_anew = positions[0].diff() != 1
    if not bool(starts_anew.any()) or not bool((positions[0, 1:][starts_anew] == 0).all() & (positions[0, 0] == 0)):
        return None
    starts = starts_anew.nonzero()[:, 0] + 1
    bounds = torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), positions.shape[1])])
    return Sequences.from_cu_seqlens(bounds, positions.shape[1])


def bounds_of(real: Tensor) -> tuple[Tensor, Tensor]:
    """Where the prompts of a padding mask lie, without waiting for the device.

    Args:
        real: Bool [B, slots], True where a slot holds a token.

    Returns:
        The first slot and the end of each prompt, int32 [B, 2]; 0 and 0 for a prompt without tokens. And whether no
        padding stands between tokens, bool without dimensions.
    """
    slot = torch.arange(real.shape[1], dtype=torch.int32, device=real.device)
    end = torch.where(real, slot + 1, 0).amax(1)
    first = torch.where(real, slot, end[:, None]).amin(1)
    return torch.stack([first, end], 1), (real.sum(1) == end - first).all()


def spans_of(real: Tensor) -> tuple[tuple[Span, ...], bool]:
    """The spans of a padding mask, and whether no padding stands between tokens: bounds_of on the host, in one wait."""
    bounds, whole = bounds_of(real)
    *flat, is_whole = torch.cat([bounds.flatten(), whole.to(bounds.dtype)[None]]).tolist()  # one transfer
    return tuple(Span(*span) for span in zip(flat[::2], flat[1::2], strict=True)), bool(is_whole)


def attend_each(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: Prompts,
) -> Tensor:
    """Attention of each prompt without its padding. Prompts of one span go together.

    Args:
        attend: Takes query [b, Hq, s_q, D], key [b, Hkv, s_kv, D], value and lengths, and gives [b, Hq, s_q, Dv]. The
            queries are the last positions. lengths is None, or int32 [b]: how many keys hold tokens, before padding.
        query: [B, Hq, S_q, D].
        key: [B, Hkv, slots, D].
        value: [B, Hkv, slots, Dv].
        prompts: Where the prompts lie.

    Returns:
        [B, Hq, S_q, Dv], zeros where a query is padding.

    Raises:
        UnsupportedError: Masks are recorded, and the prompts differ in their places.
    """
    spans = prompts.spans
    if spans is None:
        used = slice(prompts.offset + query.shape[2])
        return attend(query, key[:, :, used], value[:, :, used], None)
    if isinstance(spans, Tensor):
        return _attend_moved(attend, query, key, value, prompts.offset, *spans.unbind(1))
    with_gaps = entries_with_gaps(prompts)
    if is_recording() and (len(set(spans)) > 1 or (with_gaps and len(spans) > 1)):
        raise UnsupportedError(
            "record_masks cannot record a batch of prompts with different padding, whose maps differ in size: "
            "record them one by one"
        )
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for entry in with_gaps:
        assert prompts.real is not None
        slots = prompts.real[entry].nonzero()[:, 0]
        own_rows = slots[slots >= prompts.offset] - prompts.offset
        if len(own_rows) > 0:
            alone = query[entry, None][:, :, own_rows], key[entry, None][:, :, slots], value[entry, None][:, :, slots]
            output[entry, :, own_rows] = attend(*alone, None)[0]
    for span in sorted(set(spans)):
        rows = slice(max(span.first - prompts.offset, 0), span.end - prompts.offset)
        entries = [entry for entry, its in enumerate(spans) if its == span and entry not in with_gaps]
        if rows.stop <= rows.start or not entries:
            continue
        used = slice(*span)
        alone = query[entries, :, rows], key[entries, :, used], value[entries, :, used]
        output[entries, :, rows] = attend(*alone, None)
    return output


def entries_with_gaps(prompts: Prompts) -> list[int]:
    """The prompts that have padding among their tokens. Waits for the device where there may be one."""
    if prompts.real is None or not isinstance(prompts.spans, tuple):
        return []
    tokens = prompts.real.sum(1).tolist()
    return [entry for entry, span in enumerate(prompts.spans) if span.end - span.first != tokens[entry]]


def _attend_moved(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    first: Tensor,
    end: Tensor,
) -> Tensor:
    """attend_each for spans that only the device knows: all prompts move to slot 0, and their padding behind them.

    Args:
        offset: The slot of the first query. It is 0 unless all prompts start at slot 0.
    """
    used = offset + query.shape[2]
    keys, values = (_moved(tensor[:, :, :used], first, torch.zeros_like(first), end - first) for tensor in (key, value))
    queries = _moved(query, first, torch.zeros_like(first), end - first - offset)
    return _moved(attend(queries, keys, values, end - first), -first, first, end - offset)


def _moved(tensor: Tensor, by: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """[B, H, S, D] whose token s is that of ``tensor`` at s + by, for start ≤ s < stop; zeros elsewhere.

    Args:
        by: int32 [B].
        start: int32 [B].
        stop: int32 [B].
    """
    token = torch.arange(tensor.shape[2], dtype=torch.int32, device=tensor.device)
    inside = (token >= start[:, None]) & (token < stop[:, None])
    source = (token + by[:, None]).clamp(0, tensor.shape[2] - 1)
    entry = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    # heads within tokens, as models hold them
    return torch.where(inside[..., None, None], tensor.transpose(1, 2)[entry, source], 0).transpose(1, 2)
