"""AttentionVariant: what a call adds to plain causal attention, for the search and the attention alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from flexprefill.config import check_number, check_whole, plain_number
from flexprefill.runtime.pytrees import register_node
from flexprefill.variant.inputs import check_heads_tensor, check_per_head
from flexprefill.variant.sequences import Sequences

# as custom operators take them: starts and ends of the sequences, sliding_window, soft_cap, alibi_slopes
Parts = tuple[Tensor | None, Tensor | None, int | None, float | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class AttentionVariant:
    """What a call's attention is besides causal: one object for search, mask and attention.

    The parts are checked when it is made. Each call then checks that they fit its query and key. Two variants are
    equal if they have equal numbers and the same tensors. A variant is a pytree node: it goes in and out of compiled
    functions.

    Args:
        sequences: Which positions belong together. Keys of other sequences and of padding enter no mean and no score.
            Sinks, window and last query blocks are those of the query's own sequence (docs/howto/batches.md). Rows of
            padding output zeros.
        sliding_window: How many keys a query sees, its own the last. None: all up to its own. Blocks outside the window
            are not scored and not kept.
        soft_cap: cap · tanh(scores / cap) replaces the scaled products, as in Gemma 2.
        alibi_slopes: slope · (distance of the key) is subtracted from the scores. float [Hq], on query's device.
        sinks: A learned logit of each head, as in gpt-oss. It takes part in the head's softmax and has no value. The
            search does not depend on it. A returned log-sum-exp does not contain it. float [Hq], on query's device.

    Raises:
        TypeError: A part has the wrong type.
        ValueError: A part is out of range.
    """

    sequences: Sequences | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("sliding_window", "soft_cap"):
            if (plain := plain_number(getattr(self, name))) is not getattr(self, name):
                object.__setattr__(self, name, plain)
        if not (self.sequences is None or isinstance(self.sequences, Sequences)):
            raise TypeError(
                "sequences must be made by Sequences.from_lengths or from_cu_seqlens, got "
                f"{type(self.sequences).__name__}"
            )
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, 1, "an int or None")
        if self.soft_cap is not None:
            check_number("soft_cap", self.soft_cap, "a number or None")
            if not 0 < self.soft_cap < math.inf:
                raise ValueError(f"soft_cap must be positive and finite, got {self.soft_cap}")
        for name in ("alibi_slopes", "sinks"):
            if getattr(self, name) is not None:
                check_heads_tensor(name, getattr(self, name))

    @classmethod
    def of_parts(cls, parts: Parts) -> AttentionVariant:
        """The variant that `parts` was taken from."""
        starts, ends, sliding_window, soft_cap, alibi_slopes = parts
        if starts is None and sliding_window is None and soft_cap is None and alibi_slopes is None:
            return PLAIN
        sequences = None if starts is None or ends is None else Sequences(starts, ends)
        return cls(sequences, sliding_window, soft_cap, alibi_slopes)

    @property
    def parts(self) -> Parts:
        """What the search and the logits depend on, one by one, as an operator takes it."""
        starts, ends = (None, None) if self.sequences is None else (self.sequences.starts, self.sequences.ends)
        soft_cap = None if self.soft_cap is None else float(self.soft_cap)
        return starts, ends, self.sliding_window, soft_cap, self.alibi_slopes

    @property
    def changes_search(self) -> list[str]:
        """The names of the given parts that the search depends on."""
        names = ("sequences", "sliding_window", "soft_cap", "alibi_slopes")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def cut(self) -> bool:
        """Whether anything but the causal edge hides keys."""
        return self.sequences is not None or self.sliding_window is not None

    def check_fits(self, query: Tensor, key: Tensor) -> None:
        """Raises ValueError unless the parts have query's and key's sizes and device."""
        if self.sequences is not None:
            self.sequences.check_fits(key)
        for name, tensor in (("alibi_slopes", self.alibi_slopes), ("sinks", self.sinks)):
            if tensor is not None:
                check_per_head(name, tensor, query)

    def over(self, kv_len: int) -> AttentionVariant:
        """The same over so many keys: without a sliding window that hides none of them."""
        if self.sliding_window is None or self.sliding_window < kv_len:
            return self
        return replace(self, sliding_window=None)

    def _all(self) -> tuple[object, ...]:
        return self.sequences, self.sliding_window, self.soft_cap, self.alibi_slopes, self.sinks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionVariant):
            return NotImplemented
        # comparing what tensors hold would wait for the device
        return all(
            ours is theirs or (isinstance(ours, (int, float)) and ours == theirs)
            for ours, theirs in zip(self._all(), other._all(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(self._all())


register_node(AttentionVariant, ("sequences", "alibi_slopes", "sinks"), ("sliding_window", "soft_cap"))

PLAIN = AttentionVariant()


def check_variant(variant: AttentionVariant | None, query: Tensor, key: Tensor) -> AttentionVariant:
    """The variant. `PLAIN` itself for None and for one that says nothing. Raises unless it fits query and key."""
    if variant is None:
        return PLAIN
    if not isinstance(variant, AttentionVariant):
        raise TypeError(f"variant must be an AttentionVariant or None, got {type(variant).__name__}")
    variant.check_fits(query, key)
    return PLAIN if variant == PLAIN else variant
