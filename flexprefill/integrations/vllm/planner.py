"""Which requests of a batch go through the search, and which stay with vLLM's own attention. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A request of the batch that goes through the search: a prompt, or a chunk of one.

    Attributes:
        row: Its place among the requests.
        first: Its first token in the batch.
        q_len: Its tokens in the batch.
        kv_len: Its tokens so far, those in the batch included. They are the last.
    """

    row: int
    first: int
    q_len: int
    kv_len: int


@dataclass(frozen=True)
class Run:
    """Requests that follow each other and stay with vLLM's own attention.

    Attributes:
        rows: Their places among the requests, from the first to one past the last.
        tokens: Their tokens in the batch, likewise.
        most_queries: The longest of them in the batch.
        most_keys: The longest of them so far.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Plan:
    """A batch, taken apart. Each request is a prompt or in a run."""

    prompts: tuple[Prompt, ...]
    runs: tuple[Run, ...]


def plan_batch(starts: Sequence[int], lengths: Sequence[int], *, min_keys: int, min_queries: int) -> Plan | None:
    """Splits a batch into long prompts and runs of the rest.

    Args:
        starts: Where each request's tokens start in the batch, and then the end of the last one, as in FlashAttention's
            ``cu_seqlens_q``. They may stay where they are for requests without tokens, which fill a batch up.
        lengths: Tokens of each request so far, those in the batch included.
        min_keys: The length from which a request is a long prompt, if it also has
        min_queries: so many tokens in the batch. 2 or more, so a step of decoding never is one.

    Returns:
        None where no request is a long prompt.

    Raises:
        ValueError: The lists do not fit together.
    """
    if len(starts) != len(lengths) + 1:
        raise ValueError(f"starts must be one more than the requests, got {len(starts)} for {len(lengths)} requests")
    if min_queries < 2:
        raise ValueError(f"min_queries must be 2 or more, because one query is a step of decoding, got {min_queries}")
    prompts, runs, first_row = [], [], 0
    for row, kv_len in enumerate(lengths):
        q_len = starts[row + 1] - starts[row]
        if q_len < 0:
            raise ValueError(f"starts must ascend, got {starts[row]} before {starts[row + 1]}")
        if q_len < min_queries or kv_len < min_keys:
            continue
        if kv_len < q_len:
            raise ValueError(f"lengths[{row}] must be its {q_len} tokens in the batch or more, got {kv_len}")
        prompts.append(Prompt(row, starts[row], q_len, kv_len))
        runs += _run(starts, lengths, first_row, row)
        first_row = row + 1
    if not prompts:
        return None
    runs += _run(starts, lengths, first_row, len(lengths))
    return Plan(tuple(prompts), tuple(runs))


def _run(starts: Sequence[int], lengths: Sequence[int], first: int, end: int) -> list[Run]:
    """The requests ``first`` … ``end`` - 1 as a run. Nothing where none of them has tokens."""
    if starts[first] == starts[end]:
        return []
    most_queries = max(starts[row + 1] - starts[row] for row in range(first, end))
    return [Run((first, end), (starts[first], starts[end]), most_queries, max(lengths[first:end]))]
