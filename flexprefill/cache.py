"""MaskCache: maps by layer, kept for prompts that repeat or extend an earlier one."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap, ceil_div
from flexprefill.checks import check_attention_inputs, check_config, check_last_chunk, resolve_scale, token_tensor
from flexprefill.config import PrefillConfig
from flexprefill.search import KeyMeans, search_checked
from flexprefill.search.rule import Rule

HASHED = 128  # tokens a link of the chain of hashes


@dataclass(frozen=True)
class CacheStats:
    """What a MaskCache did and holds.

    Attributes:
        hits: searches answered whole by an earlier one of the same prompt; extensions: of which only some query
            blocks were searched; misses: searched whole.
        reused_rows, searched_rows: query blocks, summed over all searches.
        evictions: maps dropped for the limit; entries, bytes: maps held now, and their size with their block means.
    """

    hits: int = 0
    extensions: int = 0
    misses: int = 0
    reused_rows: int = 0
    searched_rows: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Identity:
    """What two prompts are compared by: the caller's key, or a chain of hashes over their tokens."""

    key: Hashable | None
    chain: tuple[bytes, ...] = field(compare=False)  # whole and length say as much
    whole: bytes
    length: int

    def shared(self, other: _Identity, length: int, other_length: int) -> int:
        """How many leading tokens are the same in the first ``length`` of this and ``other_length`` of the other."""
        if self.key != other.key:
            return 0
        limit = min(length, other_length)
        if self.key is not None or (self.whole == other.whole and self.length == other.length):
            return limit
        low, high = 0, min(len(self.chain), len(other.chain))
        while low < high:  # each hash covers all tokens before it
            middle = (low + high + 1) // 2
            if self.chain[middle - 1] == other.chain[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return min(low * HASHED, limit)


@dataclass(frozen=True)
class _Entry:
    identity: _Identity
    block_map: BlockMap
    means: KeyMeans | None  # where maps are kept on another device
    last_chunk: bool

    @property
    def nbytes(self) -> int:
        return self.block_map.words.nbytes + (0 if self.means is None else self.means.nbytes)


class MaskCache:
    """Maps by layer, found again for a prompt that repeats or extends an earlier one.

    Only query blocks that no cached map answers are searched: a row of blocks depends on the tokens up to its end
    alone. The map equals the one that a search of the whole prompt gives; rows that were the last of the shorter
    prompt, and so kept everything, are searched again. Safe to use from several threads.

    Args:
        max_bytes: of the maps and their block means together, wherever they are; the least recently used ones go
            first, and a single map above the limit is not kept.
        device: where maps are kept; None leaves each on the device that it was made on.

    Raises:
        TypeError, ValueError: ``max_bytes`` is no positive int.
    """

    def __init__(self, max_bytes: int = 2**30, *, device: torch.device | str | None = None) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an int, got {max_bytes!r}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.max_bytes = max_bytes
        self.device = None if device is None else torch.device(device)
        self._entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()  # the most recently used last
        self._stats = CacheStats()
        self._lock = threading.RLock()

    def prompt(self, token_ids: Tensor | Sequence[int] | None = None, *, key: Hashable = None) -> CachedPrompt:
        """One prompt, whose layers are then searched with :meth:`CachedPrompt.search_blocks`.

        Args:
            token_ids: [S], or [B, S] for a batch, whole numbers. They are hashed on the host, so a tensor on a GPU
                is waited for, once a prompt.
            key: instead of token_ids, whatever names a growing conversation: prompts of one key must have the same
                tokens as far as both go.

        Raises:
            TypeError, ValueError: not exactly one of them is given, or token_ids are no whole numbers.
        """
        if (token_ids is None) == (key is None):
            raise ValueError("prompt takes either token_ids or a key, and one of them")
        identity = _Identity(key, (), b"", 0) if token_ids is None else _hash_tokens(token_ids)
        return CachedPrompt(self, identity)

    def __getitem__(self, layer: int) -> BlockMap:
        """The most recently used map of a layer, of whatever prompt.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            for place, entry in reversed(self._entries.items()):
                if place[0] == layer:
                    return entry.block_map
        raise KeyError(f"layer {layer!r} has no map in the cache, which holds layers {self.layers()}")

    def layers(self) -> list[int]:
        """The layers that have a map, ascending."""
        with self._lock:
            return sorted({place[0] for place in self._entries})

    def stats(self) -> CacheStats:
        """Counts since the cache was made, and what it holds now."""
        with self._lock:
            return replace(self._stats, entries=len(self._entries), bytes=self._bytes())

    def clear(self) -> None:
        """Drops all maps; the counts stay."""
        with self._lock:
            self._entries.clear()

    def _bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _same(self, place: tuple[Hashable, ...]) -> BlockMap | None:
        with self._lock:
            entry = self._entries.get(place)
            if entry is None:
                return None
            self._entries.move_to_end(place)
            return entry.block_map

    def _best(self, kind: tuple[Hashable, ...], identity: _Identity, kv_len: int) -> tuple[int, _Entry | None]:
        """The entry of a kind that shares most tokens with a prompt, and how many."""
        with self._lock:
            best, found = 0, None
            for place, entry in self._entries.items():
                if place[: len(kind)] == kind:
                    shared = identity.shared(entry.identity, kv_len, entry.block_map.kv_len)
                    if shared >= max(best, 1):
                        best, found = shared, place
            if found is None:
                return 0, None
            self._entries.move_to_end(found)
            return best, self._entries[found]

    def _keep(self, place: tuple[Hashable, ...], entry: _Entry) -> None:
        with self._lock:
            self._entries.pop(place, None)
            if entry.nbytes > self.max_bytes:
                return
            self._entries[place] = entry
            held = self._bytes()
            while held > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                held -= dropped.nbytes
                self._count(evictions=1)

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + count for name, count in counts.items()}
            )


@dataclass(frozen=True)
class CachedPrompt:
    """A prompt of a MaskCache; see :meth:`MaskCache.prompt`."""

    cache: MaskCache
    identity: _Identity

    def search_blocks(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        config: PrefillConfig = PrefillConfig(),
        *,
        scale: float | None = None,
        last_chunk: bool = True,
        implementation: str = "auto",
    ) -> BlockMap:
        """As :func:`flexprefill.search_blocks`, searching only the query blocks that no cached map answers.

        Args:
            layer: number of the layer; another layer's maps are never used.
            query, key, config, scale, last_chunk, implementation: as in :func:`flexprefill.search_blocks`; key has
                all keys of the prompt so far, and query the last of them or all.

        Raises:
            TypeError, ValueError: as :func:`flexprefill.search_blocks`, or the prompt has fewer tokens than key.
        """
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layer must be an int, got {layer!r}")
        check_attention_inputs(query, key)
        check_config(config)
        check_last_chunk(last_chunk)
        q_len, kv_len, block = query.shape[2], key.shape[2], config.block_size
        if self.identity.key is None and self.identity.length < kv_len:
            raise ValueError(f"key must have at most the prompt's {self.identity.length} tokens, got S_kv={kv_len}")
        rule = Rule.of(config, scale=resolve_scale(scale, query.shape[3]), last_chunk=last_chunk)
        everywhere = rule._replace(last_full_blocks=config.last_full_blocks)
        kind = (layer, everywhere, implementation, *query.shape[:2], key.shape[1], query.shape[3], query.dtype)
        place = (*kind, self.identity, q_len, kv_len, last_chunk)

        known = self.cache._same(place)
        if known is not None:
            self.cache._count(hits=1, reused_rows=ceil_div(q_len, block))
            return known.to(query.device)
        shared, entry = self.cache._best(kind, self.identity, kv_len)
        means = KeyMeans()
        first = (kv_len - q_len) // block
        reused = first
        if entry is not None:
            held = entry.block_map
            # blocks that are whole in both prompts, and whose rows were not among the last of the other
            held_last = config.last_full_blocks if entry.last_chunk else 0
            known = max(0, min(shared // block, ceil_div(held.kv_len, block) - held_last))
            if entry.means is not None:
                means = entry.means.first(known)
            end = min(known, ceil_div(kv_len, block) - rule.last_full_blocks)
            if (kv_len - q_len) % block == held.offset % block == 0 and held.offset // block <= first < end:
                reused = end
        start = reused * block - (kv_len - q_len) if reused > first else 0
        block_map = None
        if start < q_len:
            searched = query[:, :, start:], key, config, rule.scale, last_chunk, implementation, means
            block_map = search_checked(*searched)
        if reused > first:
            rows = _rows(held, first, reused).to(query.device)
            block_map = BlockMap.from_chunks([rows] if block_map is None else [rows, block_map])
        counts = {"extensions": 1} if reused > first else {"misses": 1}
        self.cache._count(**counts, reused_rows=reused - first, searched_rows=ceil_div(q_len, block) - (reused - first))
        kept = block_map if self.cache.device is None else block_map.to(self.cache.device)
        self.cache._keep(place, _Entry(self.identity, kept, means if kept is block_map else None, last_chunk))
        return block_map


def _rows(block_map: BlockMap, first: int, end: int) -> BlockMap:
    """A view of rows first to end, counted from the prompt's start, of a map that starts on a block's edge."""
    block = block_map.block_size
    before = block_map.offset // block
    width = ceil_div(end, 32)
    words = block_map.words[:, :, first - before : end - before, :width]
    return BlockMap(words, (end - first) * block, end * block, block)


def _hash_tokens(token_ids: Tensor | Sequence[int]) -> _Identity:
    tokens = token_tensor(token_ids)
    if tokens.dim() not in (1, 2) or 0 in tokens.shape:
        raise ValueError(f"token_ids must be [S] or [B, S], got {list(tokens.shape)}")
    by_position = tokens.to(torch.int64).reshape(-1, tokens.shape[-1]).T.contiguous()  # [S, B]
    digest = hashlib.sha256(str(by_position.shape[1]).encode())
    chain = []
    length = by_position.shape[0]
    for start in range(0, length, HASHED):
        digest.update(by_position[start : start + HASHED].numpy().tobytes())
        if start + HASHED <= length:
            chain.append(digest.digest())
    return _Identity(None, tuple(chain), digest.digest(), length)
