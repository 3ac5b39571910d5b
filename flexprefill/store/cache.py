"""MaskCache: maps by layer, kept for prompts that repeat or extend an earlier one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.runtime.devices import check_device
from flexprefill.runtime.listeners import is_recording, note_attention
from flexprefill.search.blocks import search_checked
from flexprefill.search.defaults import resolve_config
from flexprefill.search.rule import Rule
from flexprefill.store.held_maps import HeldMap, HeldMaps, Identity, Place
from flexprefill.store.tokens import token_tensor
from flexprefill.variant.inputs import check_attention_inputs, check_last_chunk, resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN


@dataclass(frozen=True)
class CacheStats:
    """What a MaskCache did and holds.

    Attributes:
        hits: Searches answered whole by an earlier search of the same prompt.
        extensions: Searches of which only some query blocks were searched.
        misses: Searches of all query blocks.
        reused_rows: Query blocks that were not searched, over all searches.
        searched_rows: Query blocks that were searched, over all searches.
        evictions: Maps dropped because of the limit.
        entries: Maps held now.
        bytes: Their size, with that of their prompts' tokens.
    """

    hits: int = 0
    extensions: int = 0
    misses: int = 0
    reused_rows: int = 0
    searched_rows: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


class MaskCache:
    """Maps by layer, found again for a prompt that repeats or extends an earlier one.

    Only query blocks that no cached map answers are searched, because a row of blocks depends only on the tokens up to
    its end. The map equals that of a search of the whole prompt. The last rows of the shorter prompt kept everything
    and are searched again. A cache can be used from several threads and on several CUDA streams.

    Args:
        max_bytes: Limit of the maps together, on any device, and of their prompts' tokens. The least recently used maps
            are dropped first. A single map above the limit is not kept.
        device: Where maps are kept. Default: each map stays on the device that made it.

    Raises:
        TypeError, ValueError: ``max_bytes`` is no positive int, or ``device`` is not here.
    """

    def __init__(self, max_bytes: int = 2**30, *, device: torch.device | str | None = None) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an int, got {max_bytes!r}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.max_bytes = max_bytes
        self.device = None if device is None else check_device(device)
        if self.device is not None and self.device.type == "meta":
            raise ValueError("device must be one that can hold maps, got meta")
        self._maps = HeldMaps()
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies. They share the maps, which nobody changes, and have a lock of their own."""
        with self._lock:
            maps = [(place, replace(held, stream=None, made=None)) for place, held in self._maps.items()]
            return {**self.__dict__, "_maps": maps, "_counts": self._counts.copy(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _maps=HeldMaps(state["_maps"]), _lock=threading.RLock())

    def prompt(self, token_ids: Tensor | Sequence[int] | None = None, *, key: Hashable = None) -> CachedPrompt:
        """One prompt. Its layers are then searched with ``CachedPrompt.search_blocks``.

        Args:
            token_ids: Whole numbers, [S], or [B, S] for a batch. They are compared on the host: a tensor on a GPU is
                waited for, once a prompt.
            key: Instead of token_ids, a name for a growing conversation. Prompts of one key must have the same tokens
                as far as both go.

        Returns:
            The prompt, bound to this cache.

        Raises:
            TypeError, ValueError: Not exactly one of them is given, token_ids are no whole numbers, or key has no hash.
        """
        if (token_ids is None) == (key is None):
            raise ValueError("prompt takes either token_ids or a key, and one of them")
        if isinstance(token_ids, str):
            raise TypeError(f"token_ids must be whole numbers, got a str; a name goes to key={token_ids!r}")
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"key must be hashable, got {type(key).__name__}") from error
        identity = Identity(key) if token_ids is None else _identify(token_ids)
        with self._lock:
            others = self._maps.identities()
            # all layers of a prompt share one copy of its tokens, also if the prompt comes again
            prompt = CachedPrompt(self, next((other for other in others if other == identity), identity))
            # hashing and comparing read all tokens once: now, and not while the device waits for the first layer
            hash(prompt.identity)
            for other in others:
                prompt._shared(other)
        return prompt

    def __getitem__(self, layer: int) -> BlockMap:
        """The most recently used map of a layer, of any prompt.

        Raises:
            KeyError: The layer has no map.
        """
        with self._lock:
            held = self._maps.newest(layer)
            if held is not None:
                return held.ready()
        raise KeyError(f"layer {layer!r} has no map in the cache, which holds layers {self.layers()}")

    def layers(self) -> list[int]:
        """The layers that have a map, ascending."""
        with self._lock:
            return sorted({layer for place, _ in self._maps.items() if isinstance(layer := place.kind[0], int)})

    def stats(self) -> CacheStats:
        """Counts since the cache was made, and what it holds now."""
        with self._lock:
            return CacheStats(**self._counts, entries=len(self._maps), bytes=self._maps.nbytes)

    def clear(self) -> None:
        """Drops all maps. The counts stay."""
        with self._lock:
            self._maps = HeldMaps()

    def _same(self, place: Place) -> BlockMap | None:
        with self._lock:
            held = self._maps.use(place)
            return None if held is None else held.ready()

    def _best(
        self, kind: tuple[Hashable, ...], prompt: CachedPrompt, first: int, end: int, last_full_blocks: int
    ) -> BlockMap | None:
        """The rows from ``first`` on, up to ``end`` at most, of the map of a kind that answers most of them.

        Args:
            first: The first query block, counted from the prompt's start.
            end: Counted likewise.
            last_full_blocks: Last rows of a map that ends its prompt. They keep everything, and answer nothing.
        """
        with self._lock:
            best, found = first, None
            for place, held in self._maps.of_kind(kind):
                kept = held.block_map
                block = kept.block_size
                if kept.offset % block or kept.offset // block > first:
                    continue
                last = last_full_blocks if place.last_chunk else 0
                rows = min(end, kept.kv_len // block, ceil_div(kept.kv_len, block) - last)
                answers = min(rows, prompt._shared(held.identity) // block)
                if answers > best:
                    best, found = answers, (place, held)
            if found is None:
                return None
            place, held = found
            self._maps.use(place)
            kept = held.ready()
        before, block = kept.offset // kept.block_size, kept.block_size
        words = kept.words[:, :, first - before : best - before, : ceil_div(best, 32)]
        return BlockMap(words, (best - first) * block, best * block, block)

    def _keep(self, place: Place, held: HeldMap) -> None:
        with self._lock:
            if held.block_map.words.nbytes + len(held.identity.tokens) > self.max_bytes:
                self._maps.drop(place)
                return
            self._maps.put(place, held)
            while self._maps.nbytes > self.max_bytes:
                self._maps.drop_oldest()
                self._count(evictions=1)

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


@dataclass(frozen=True)
class CachedPrompt:
    """A prompt of a MaskCache, made by ``MaskCache.prompt``."""

    cache: MaskCache
    identity: Identity
    _known: WeakKeyDictionary[Identity, int] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def _shared(self, other: Identity) -> int:
        """As identity.shared, computed once for each other prompt. The caller holds the cache's lock."""
        shared = self._known.get(other)
        if shared is None:
            shared = self._known[other] = self.identity.shared(other)
        return shared

    def search_blocks(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        config: PrefillConfig | None = None,
        *,
        scale: float | None = None,
        last_chunk: bool = True,
    ) -> BlockMap:
        """As ``flexprefill.search_blocks``, but only query blocks that no cached map answers are searched.

        Args:
            layer: Number of the layer. Other layers' maps are never used.
            query: As in ``flexprefill.search_blocks``: all queries of the prompt so far, or the last of them.
            key: As in ``flexprefill.search_blocks``: all keys of the prompt so far.
            config: As in ``flexprefill.search_blocks``.
            scale: As in ``flexprefill.search_blocks``.
            last_chunk: As in ``flexprefill.search_blocks``.

        Returns:
            The map of these queries.

        Raises:
            TypeError, ValueError: As ``flexprefill.search_blocks``, or the prompt has fewer tokens than key, or another
                batch size.
        """
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        check_attention_inputs(query, key)
        config = resolve_config(config, PLAIN)
        check_last_chunk(last_chunk)
        if config.guard is not None:
            raise ValueError(
                f"config.guard must be None in a MaskCache, whose maps hold rows of several searches, got "
                f"{config.guard}: call flexprefill.guard_blocks on the map"
            )
        q_len, kv_len, block = query.shape[2], key.shape[2], config.block_size
        if self.identity.key is None:
            if self.identity.length < kv_len:
                raise ValueError(f"key must have at most the prompt's {self.identity.length} tokens, got S_kv={kv_len}")
            if self.identity.batch != query.shape[0]:
                raise ValueError(f"query must have the prompt's batch size {self.identity.batch}, got {query.shape[0]}")
        rule = Rule.of(config, scale=resolve_scale(scale, query.shape[3]), last_chunk=last_chunk)
        if is_recording():
            note_attention(PlainAttention(query, key, rule.scale, PLAIN), config)
        everywhere = rule._replace(last_full_blocks=config.last_full_blocks)
        shapes = *query.shape[:2], key.shape[1], query.shape[3], query.dtype
        kind = layer, everywhere, *shapes, self.identity.beginning(block)
        place = Place(kind, self.identity, q_len, kv_len, last_chunk)

        known = self.cache._same(place)
        if known is not None:
            self.cache._count(hits=1, reused_rows=ceil_div(q_len, block))
            return known.to(query.device)
        first, start_in_block = divmod(kv_len - q_len, block)
        # only whole rows that are not last can be answered; one map may answer some, and another those after
        end = 0 if start_in_block else min(kv_len // block, ceil_div(kv_len, block) - rule.last_full_blocks)
        answers: list[BlockMap] = []
        row = first
        while (answer := self.cache._best(kind, self, row, end, config.last_full_blocks)) is not None:
            answers.append(answer)
            row = answer.kv_len // block
        rest: list[BlockMap] = []
        if not answers or row * block < kv_len:
            # the device waits for this search, so it comes before the pieces are put together
            others = query[:, :, row * block - (kv_len - q_len) :] if answers else query
            rest = [search_checked(others, key, config, rule.scale, last_chunk, "auto", None)]
        pieces = [answer.to(query.device) for answer in answers] + rest
        block_map = BlockMap.from_chunks(pieces) if answers else rest[0]
        reused, searched = row - first, ceil_div(q_len, block) - (row - first)
        self.cache._count(**{"extensions" if reused else "misses": 1}, reused_rows=reused, searched_rows=searched)
        kept = block_map if self.cache.device is None else block_map.to(self.cache.device)
        self.cache._keep(place, HeldMap.of(self.identity, kept))
        return block_map


def _identify(token_ids: Tensor | Sequence[int]) -> Identity:
    tokens = token_tensor(token_ids)
    if tokens.dim() not in (1, 2) or 0 in tokens.shape:
        raise ValueError(f"token_ids must be [S] or [B, S], got {list(tokens.shape)}")
    by_position = tokens.to(torch.int64).reshape(-1, tokens.shape[-1]).T.numpy()  # [S, B]
    narrow = by_position.astype(np.int32)
    if (narrow == by_position).all():  # true of every tokenizer's numbers
        by_position = narrow
    return Identity(None, by_position.tobytes(), by_position.dtype.str, by_position.shape[1])
