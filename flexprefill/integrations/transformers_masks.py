"""The mask function for transformers' AttentionMaskInterface: it reads where the prompts lie."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexprefill.errors import UnsupportedError
from flexprefill.integrations.prompt_mask import PromptMask, additive
from flexprefill.integrations.prompts import Prompts, Span, bounds_of, spans_of
from flexprefill.integrations.transformers_internals import causal_mask_function, is_bidirectional, sdpa_mask
from flexprefill.runtime.memory import PIECE
from flexprefill.runtime.thread_state import is_fake
from flexprefill.runtime.tracing import assert_in_graph, is_tracing
from flexprefill.variant.sequences import Sequences

NOT_CAUSAL = (
    "attention_mask must be causal with a window, padding and packed sequences alone: flexprefill takes no images "
    "whose tokens see each other, and no other mask"
)
PADDING_BETWEEN = (
    "attention_mask must have padding before or behind a prompt only, got padding between tokens: leave the hole out; "
    "padding may stand anywhere in a call that continues a filled cache (past_key_values), outside of torch.compile"
)
NOT_CAUSAL_IN_GRAPH = (
    "attention_mask must be causal with padding alone inside torch.compile: flexprefill takes packed sequences "
    "(position_ids that start anew) outside of it, and no images whose tokens see each other"
)


class AskedMask(NamedTuple):
    """What transformers asks a mask function for. ``attention_mask`` is the padding mask, bool [B, tokens]."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int = 0
    kv_offset: int = 0
    mask_function: Callable[..., Any] = causal_mask_function
    attention_mask: Tensor | None = None
    local_size: int | None = None
    allow_is_causal_skip: bool = True
    use_vmap: bool = False
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, given: dict[str, Any]) -> AskedMask:
        """From the keyword arguments of a call, with numbers as ints. Waits for the device if they lie there."""
        asked = {name: given[name] for name in cls._fields if name in given}
        for name in COUNTS:
            if asked.get(name) is not None:
                asked[name] = as_int(asked[name])
        return cls(**asked)

    @property
    def offset(self) -> int:
        """The slot of the first query."""
        return self.q_offset - self.kv_offset

    @property
    def used(self) -> int:
        """Slots up to the last query's."""
        return self.offset + self.q_length


COUNTS = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "local_size")


def as_int(number: Any) -> int:
    """An int from a count of tokens: an int, NumPy's, or a tensor of one element, as caches give it."""
    if isinstance(number, Tensor):
        if is_tracing():
            raise UnsupportedError(
                "past_key_values must be no filled static cache for a prompt inside torch.compile, because its length "
                "is on the device: compile the steps of decoding alone, as generate() does"
            )
        # a tensor of shapes alone has no number: its cache counts as empty
        return 0 if has_shapes_alone(number) else int(number)
    # a size that torch.compile made a symbol is an int already
    return number if isinstance(number, int) or is_tracing() else operator.index(number)


def has_shapes_alone(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers: on the meta device, or of a FakeTensorMode."""
    return tensor.device.type == "meta" or is_fake(tensor)


def prompt_mask(config: Any = None, **given: Any) -> PromptMask | Tensor | None:
    """The mask function for transformers' AttentionMaskInterface.

    Args:
        config: The model's.
        given: The arguments of an AskedMask, and others of transformers' own mask functions.

    Returns:
        A PromptMask for causal queries. For a single query that does not see all keys, and without causality, it is the
        mask of the implementation sdpa, as numbers to add to the scores. None: not causal, and everything is seen.

    Raises:
        UnsupportedError: A search over prompts cannot follow the mask. A compiled graph finds some of these only when
            it runs, and then raises a RuntimeError.
    """
    dtype = given.get("dtype", torch.float32)
    if is_bidirectional(given):
        return additive(sdpa_mask(**given), dtype)
    if given["q_length"] == 1:
        mask = sdpa_mask(**given)
        if mask is not None:
            return additive(mask, dtype)
        kv_len = as_int(given["kv_length"])
        return PromptMask(Prompts(given["batch_size"], kv_len - 1, None, None, given.get("device", "cpu")), 1, kv_len)
    asked = AskedMask.of(given)
    if asked.local_size is not None and asked.local_size == getattr(config, "attention_chunk_size", None):
        raise UnsupportedError(
            f"layers that attend in chunks (attention_chunk_size={asked.local_size}) are not supported"
        )
    if asked.used > asked.kv_length:
        raise UnsupportedError(
            f"past_key_values must count the tokens that it holds: it told a mask of {asked.kv_length} keys from "
            f"position {asked.kv_offset} on, and {asked.q_length} queries from position {asked.q_offset} on"
        )
    return PromptMask(_prompts(asked), asked.q_length, asked.kv_length)


def _prompts(asked: AskedMask) -> Prompts:
    window, sequences = asked.local_size, None
    if not is_tracing() and has_shapes_alone(torch.empty(0, device=asked.device)):
        return Prompts(asked.batch_size, asked.offset, None, None, asked.device)
    if not asked.allow_is_causal_skip:
        # transformers says so too of every prompt compiled without a cache, in case it is packed
        if is_tracing():
            _require(not asked.use_vmap and _is_causal(asked), NOT_CAUSAL_IN_GRAPH)
        else:
            window, sequences = _structure_of(asked)
    if window is not None and window >= asked.used:
        window = None
    spans, real = (None, None) if asked.attention_mask is None else _places(asked)
    if sequences is not None and spans is not None:
        raise UnsupportedError("attention_mask must have no padding where position_ids start anew (packed sequences)")
    return Prompts(asked.batch_size, asked.offset, window, spans, asked.device, real, sequences)


def _places(asked: AskedMask) -> tuple[tuple[Span, ...] | Tensor | None, Tensor | None]:
    """The spans and the real tokens of a padding mask, as Prompts takes them; None if each prompt fills all slots."""
    assert asked.attention_mask is not None
    real = asked.attention_mask[:, asked.kv_offset : asked.kv_offset + asked.used].bool()
    # slots that the padding mask does not reach are padding
    real = nn.functional.pad(real, (0, asked.used - real.shape[1]))
    if is_tracing():
        bounds, whole = bounds_of(real)
        _require(whole, PADDING_BETWEEN)
        if asked.offset > 0:
            _require(
                (bounds[:, 0] == 0).all(),
                "attention_mask must have no padding before a prompt that follows a cache inside torch.compile: "
                "pad on the right, or compile without chunks",
            )
        return bounds, None
    spans, is_whole = spans_of(real)
    if not is_whole:
        _require(asked.offset > 0, PADDING_BETWEEN)  # else it is another turn of a padded batch
        return spans, real
    return None if set(spans) == {Span(0, asked.used)} else spans, None


def _structure_of(asked: AskedMask) -> tuple[int | None, Sequences | None]:
    """The window and the sequences of a mask that may be another one, as transformers says.

    All its elements are looked at, in pieces. Each query has to see the keys from some key up to its own.

    Raises:
        UnsupportedError: It is another mask.
    """
    # relative to the first slot
    position = torch.arange(asked.q_length, device=asked.device) + asked.offset
    key = torch.arange(asked.kv_length, device=asked.device)
    firsts, right = [], torch.ones((), dtype=torch.bool, device=asked.device)
    step = max(1, PIECE // (asked.batch_size * asked.kv_length))
    for start in range(0, asked.q_length, step):
        rows = position[start : start + step]
        piece = {"q_length": len(rows), "q_offset": asked.q_offset + start, "attention_mask": None}
        seen = sdpa_mask(**{**asked._asdict(), **piece, "allow_is_causal_skip": False})[:, 0]
        first = seen.int().argmax(-1)
        right = right & (seen == ((key >= first[..., None]) & (key <= rows[:, None]))).all()
        firsts.append(first)
    first = torch.cat(firsts, 1)
    # a sequence starts where a query sees only itself; with a window of one, every query does
    starts = torch.where(first == position, position, 0).cummax(1).values
    cut = first > starts
    reach = position - first + 1
    widest = torch.where(cut, reach, 0).amax()
    right = right & (first == torch.maximum(starts, position - widest + 1).where(widest > 0, starts)).all()
    is_right, window, is_packed = torch.stack([right.long(), widest.long(), (starts > 0).any().long()]).tolist()
    _require(bool(is_right), NOT_CAUSAL)
    sequences = None
    if is_packed:
        if asked.offset > 0:
            raise UnsupportedError("past_key_values must be empty where position_ids start anew (packed sequences)")
        sequences = _sequences_from(starts)
    return window or None, sequences


def _sequences_from(starts: Tensor) -> Sequences:
    """The sequences of rows without padding, from the first position of each position's sequence: int64 [B, S]."""
    starts = starts[:1] if bool((starts == starts[:1]).all()) else starts
    last = starts.shape[1]
    position = torch.arange(last, device=starts.device)
    following = torch.where(starts == position, position, last)[:, 1:]  # where one starts, at or behind each next
    following = nn.functional.pad(following, (0, 1), value=last)
    ends = following.flip(1).cummin(1).values.flip(1)
    return Sequences(starts.to(torch.int32).contiguous(), ends.to(torch.int32).contiguous())


def _is_causal(asked: AskedMask) -> Tensor:
    """Whether each query sees the key before its own and none sees the next: bool without dimensions.

    A causal mask does so, also with a window. Packed sequences hide the key before their first token. Tokens that see
    each other see the next key.
    """
    batch = torch.arange(asked.batch_size, device=asked.device)[:, None]
    position = torch.arange(1, asked.q_length, device=asked.device)[None] + asked.q_offset
    head = torch.zeros_like(position)
    before = asked.mask_function(batch, head, position, position - 1)
    after = asked.mask_function(batch, head, position - 1, position)
    return (before & ~after).all()


def _require(condition: bool | Tensor, message: str) -> None:
    """Raises UnsupportedError unless the condition holds. Inside torch.compile the graph raises RuntimeError."""
    if is_tracing() and isinstance(condition, Tensor):
        assert_in_graph(condition, message)
    elif not condition:
        raise UnsupportedError(message)
