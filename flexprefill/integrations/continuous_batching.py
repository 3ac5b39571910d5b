"""Attention of transformers' continuous batching: the requests of a batch, and the attention of each.

All queries of a batch stand in a row, and so do the keys. A request with one query is a step of decoding: steps are
dense, and those of about the same length go together. A request with more queries is a prompt or a chunk of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexprefill.errors import UnsupportedError
from flexprefill.integrations.transformers_internals import keys_in_cache, paged_kind, paged_window
from flexprefill.runtime.listeners import is_recording
from flexprefill.runtime.tracing import is_tracing

KEPT = "_flexprefill_batch"  # the attribute of a batch's own tensor in which its plan is kept

AttendPrompt = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
AttendSteps = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Prompt(NamedTuple):
    """The queries and keys of a request: the queries are the last positions."""

    rows: slice
    keys: slice
    last: bool  # whether they end the prompt


class Steps(NamedTuple):
    """Requests of one query each that are attended together."""

    rows: Tensor  # int64 [n]
    keys: Tensor  # int64 [n, most]; behind a request's keys stands its last one again
    seen: Tensor | None  # bool [n, 1, 1, most], which of them are keys; None: all


class Plan(NamedTuple):
    """What to attend to in a layer."""

    prompts: tuple[Prompt, ...]
    steps: tuple[Steps, ...]


@dataclass
class Batch:
    """The requests of a batch, as the layers of one kind or of several see them.

    Attributes:
        queries: Where the queries of each request begin, and the end of the last one's.
        keys: The same for keys, by the kind of layer.
        sampled: The queries behind which a token is generated. None: that is not known.
        layers: The layers that were attended.
        plans: Made so far, by kind of layer and window.
    """

    queries: list[int]
    keys: dict[str | None, list[int]]
    sampled: frozenset[int] | None = None
    layers: set[int] = field(default_factory=set)
    plans: dict[tuple[str | None, int | None], Plan] = field(default_factory=dict)

    @classmethod
    def read(cls, queries: Tensor, keys: Tensor | Mapping[str, Tensor], sampled: Tensor | None = None) -> Batch:
        """From cu_seq_lens_q, cu_seq_lens_k and logits_indices. Waits for the device, once."""
        by_kind: dict[str | None, Tensor] = {None: keys} if isinstance(keys, Tensor) else dict(keys.items())
        given = [queries, *by_kind.values(), *([] if sampled is None else [sampled])]
        on_host = iter(torch.cat(given).tolist())
        parts = [list(islice(on_host, len(part))) for part in given]
        known = None if sampled is None else frozenset(parts.pop())
        return cls(parts[0], dict(zip(by_kind, parts[1:], strict=True)), known)

    def plan(self, kind: str, window: int | None, device: torch.device) -> Plan:
        """The plan for layers of a kind, in which a query sees so many keys."""
        kept = kind if kind in self.keys else None
        if (kept, window) not in self.plans:
            self.plans[kept, window] = make_plan(self, self.keys[kept], window, device)
        return self.plans[kept, window]


def batch_of(layer: int, given: Mapping[str, Any]) -> Batch:
    """The batch of a call. It is kept on the tensor cu_seq_lens_q, which all layers of a forward pass are given.

    A layer that comes a second time shows that the tensor was filled anew.
    """
    queries = given["cu_seq_lens_q"]
    held: Batch | None = getattr(queries, KEPT, None)
    if held is None or layer in held.layers:
        held = Batch.read(queries, given["cu_seq_lens_k"], given.get("logits_indices"))
        setattr(queries, KEPT, held)
    held.layers.add(layer)
    return held


def make_plan(batch: Batch, keys: list[int], window: int | None, device: torch.device) -> Plan:
    """Prompts one by one; steps together whose lengths have the same number of binary digits.

    So no step is padded to twice its own length.
    """
    prompts: list[Prompt] = []
    by_digits: dict[int, list[tuple[int, int, int]]] = {}  # the row, the first key and the end
    for rows, own in zip(pairwise(batch.queries), pairwise(keys), strict=True):
        if rows[1] - rows[0] > 1:
            last = batch.sampled is None or rows[1] - 1 in batch.sampled
            prompts.append(Prompt(slice(*rows), slice(*own), last))
        elif rows[1] > rows[0]:
            first = own[0] if window is None else max(own[0], own[1] - window)
            by_digits.setdefault((own[1] - first).bit_length(), []).append((rows[0], first, own[1]))
    return Plan(tuple(prompts), tuple(_together(steps, device) for _, steps in sorted(by_digits.items())))


def _together(steps: list[tuple[int, int, int]], device: torch.device) -> Steps:
    rows, first, end = torch.tensor(steps).to(device).unbind(1)
    lengths = [end - first for _, first, end in steps]
    keys = torch.minimum(first[:, None] + torch.arange(max(lengths), device=device), end[:, None] - 1)
    place = torch.arange(max(lengths), device=device)
    seen = None if min(lengths) == max(lengths) else (place < (end - first)[:, None])[:, None, None]
    return Steps(rows, keys, seen)


class Paged(NamedTuple):
    """What continuous batching gives an attention function besides tensors."""

    cache: Any
    batch: Batch
    kind: str  # the layer's
    window: int | None  # how many keys a query of the layer sees, its own the last
    indices: dict[str, Any]  # where to read and write in the cache

    @classmethod
    def of(cls, module: nn.Module, name: str, window: int | None, given: Mapping[str, Any]) -> Paged:
        """From the keyword arguments of a call of the implementation ``name``.

        Args:
            module: The layer.
            name: The implementation's, for errors.
            window: The sliding window that the model asks for.
            given: The keyword arguments.

        Raises:
            UnsupportedError: The call is not one of continuous batching, or of a kind that is not followed.
        """
        cache = given.get("cache")
        if cache is None:
            raise UnsupportedError(
                f"attn_implementation {name!r} must be called by continuous batching (generate_batch), which gives a "
                f"paged cache: take {name.partition('|')[2]!r} for other calls"
            )
        bounds = given["cu_seq_lens_q"]
        if is_tracing() or (bounds.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise UnsupportedError(
                f"attn_implementation {name!r} cannot be compiled or captured whole, because each batch has its own "
                "lengths: leave use_cuda_graph, the compile configs and the padding intervals of "
                "ContinuousBatchingConfig unset"
            )
        if given.get("block_table") is not None:
            raise UnsupportedError(
                f"attn_implementation {name!r} takes no block_table, which FlashAttention alone reads"
            )
        if is_recording():
            raise UnsupportedError(
                "record_masks cannot record continuous batching, whose batches hold requests of different lengths: "
                "record a call of the model itself"
            )
        layer: Any = module.layer_idx
        cached = paged_window(cache, layer)
        own = window if cached is None else cached if window is None else min(window, cached)
        batch = batch_of(layer, given)
        indices = {name: given[name] for name in ("read_index", "write_index")}
        return cls(cache, batch, paged_kind(cache, layer), own, {"layer_idx": layer, **indices})

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prompt: AttendPrompt, steps: AttendSteps) -> Tensor:
        """Attention of all requests.

        Args:
            query: [1, Hq, tokens, D], of all requests in a row.
            key: [1, Hkv, tokens, D], the new keys. They are written to the cache.
            value: [1, Hkv, tokens, Dv].
            prompt: Takes query [1, Hq, s_q, D], key [1, Hkv, s_kv, D] and value of a request, and whether its queries
                end the prompt. Gives [1, Hq, s_q, Dv].
            steps: Takes query [n, Hq, 1, D], key [n, Hkv, most, D], value and which keys are seen, bool
                [n, 1, 1, most] or None for all. Gives [n, 1, Hq, Dv].

        Returns:
            [1, tokens, Hq, Dv], zeros for tokens of no request.
        """
        keys, values = keys_in_cache(self.cache, key, value, **self.indices)
        plan = self.batch.plan(self.kind, self.window, query.device)
        output = query.new_zeros(query.shape[2], query.shape[1], values.shape[2])
        queries = query[0].transpose(0, 1)
        for rows, own, last in plan.prompts:
            attended = prompt(_alone(queries[rows]), _alone(keys[own]), _alone(values[own]), last)
            output[rows] = attended[0].transpose(0, 1)
        for step_rows, step_keys, seen in plan.steps:
            attended = steps(
                queries[step_rows, :, None], keys[step_keys].transpose(1, 2), values[step_keys].transpose(1, 2), seen
            )
            output[step_rows] = attended[:, 0]
        return output[None]


def _alone(tensor: Tensor) -> Tensor:
    """A request's [tokens, heads, D] as [1, heads, tokens, D], copied unless it stands alone in its memory.

    Attention is compiled anew for other layouts, for tensors that begin inside of their memory, and for views by what
    they are views of. So all requests get one kind.
    """
    if tensor.storage_offset() or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor[None].transpose(1, 2).data
